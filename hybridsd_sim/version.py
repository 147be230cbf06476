"""The version of the package, in the one place that nothing else has to be loaded for."""

__version__ = "0.1.0"
