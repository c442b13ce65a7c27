"""The program: data, models, training, studies and their reports."""

__version__ = "0.1.0"
