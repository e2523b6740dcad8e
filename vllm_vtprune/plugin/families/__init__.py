"""One module per model family: the layout of its images, and its model classes."""
