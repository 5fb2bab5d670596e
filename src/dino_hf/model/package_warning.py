"""The category of this package's warnings."""


class DinoDetrWarning(UserWarning):
    """Something that the user may want to change, from dino_hf itself. Silence it like any other category of warnings."""
