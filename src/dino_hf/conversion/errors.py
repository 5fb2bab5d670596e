"""The error that a conversion raises."""


class ConversionError(ValueError):
    """A file or folder cannot be converted. The message gives the reason and a solution."""


def reason_of(error: BaseException, limit: int = 300) -> str:
    """First line of an error's text, or else the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
