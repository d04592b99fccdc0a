"""The version of locc."""

__version__ = "0.1.0"
