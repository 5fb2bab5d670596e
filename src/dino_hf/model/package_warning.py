"""The category of this package's warnings."""


class DinoDetrWarning(UserWarning):
    """A warning from dino_hf about something that the user may want to change. Filter it like any category of warnings."""
