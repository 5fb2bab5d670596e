"""Find errors in a data set, and write a cleaned copy."""

from .checks import Report, inspect
from .cleaned_copy import write_cleaned_copy

__all__ = ["Report", "inspect", "write_cleaned_copy"]
