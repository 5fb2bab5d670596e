"""Paths given by users."""

import os
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """The path with `~` and `~user` replaced by the home folder.

    Raises:
        ValueError: there is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(
            f"{path}: {user} is no home folder of this machine; write the whole path, or ./{path} for a folder of that name."
        ) from None


def check_current_folder() -> None:
    """Raises FileNotFoundError if the folder that this process runs in was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError(
            "The folder that this command was started in has been deleted; change to a folder that exists."
        ) from None
