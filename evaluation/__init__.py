"""What pruning costs in accuracy, measured. Not part of the package."""
