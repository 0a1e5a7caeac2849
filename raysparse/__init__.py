"""raysparse: training large models with most of their weights absent, on Ray."""

__version__ = "0.1.0"
