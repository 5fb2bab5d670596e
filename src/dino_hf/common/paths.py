"""Paths that users and files name: of home folders, below a folder, and the cache."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath


def expand_home(path: str | Path) -> Path:
    """The path with `~` or `~user` replaced by the home folder.

    Raises:
        ValueError: there is no such user, or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(
            f"{path}: {user} is not a home folder of this machine; write the whole path, or ./{path} for a folder of that name."
        ) from None


def path_below(folder: Path, name: str) -> Path:
    """`folder / name`. All folders in between are real folders, not links.

    Args:
        name: relative, with "/".
    Raises:
        ValueError: the name leads out of the folder, or a folder in between is a link.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file below {folder}.")
    place = folder
    for part in relative.parts[:-1]:
        place = place / part
        if place.is_symlink():
            raise ValueError(
                f"{place} is a link, and nothing is written through links; remove it, or choose another folder."
            )
    return folder / relative


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Delete regular files below a folder, then the folders that become empty.

    Names of links, of folders, and of paths that lead through a link or out of the folder are skipped.
    """
    for name in names:
        try:
            path = path_below(folder, name)
        except ValueError:
            continue
        if path.is_symlink() or not path.is_file():
            continue
        path.unlink()
        for parent in path.relative_to(folder).parents:
            with suppress(OSError):  # it has other files
                if parent.name:
                    (folder / parent).rmdir()


class NoCacheFolder(ValueError):
    """The user has no home folder, and no environment variable names a folder for the cache."""


def cache_dir() -> Path:
    """The folder of built kernels and published checkpoints: $DINO_HF_CACHE, or dino_hf in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        NoCacheFolder: there is no such home folder.
    """
    named = os.environ.get("DINO_HF_CACHE")
    folder = named or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        place = Path(folder).expanduser().resolve()
    except RuntimeError:
        raise NoCacheFolder(
            f"{folder} is not a folder of this machine, because its home folder is unknown; set DINO_HF_CACHE to a folder for "
            "built kernels and converted checkpoints."
        ) from None
    return place if named else place / "dino_hf"
