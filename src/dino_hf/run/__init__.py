"""`train` from end to end."""

from .training_run import train

__all__ = ["train"]
