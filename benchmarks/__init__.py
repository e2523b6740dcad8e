"""Measurements, side by side in one run. Each module is a command: ``python -m benchmarks.<name> --help``."""
