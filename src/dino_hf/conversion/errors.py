"""The error that a conversion raises."""


class ConversionError(ValueError):
    """A file or folder cannot be converted. The message gives the reason and a solution."""
