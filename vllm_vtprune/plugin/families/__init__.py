"""One module for each model family: how its images lie, and the classes that serve it."""
