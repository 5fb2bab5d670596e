"""Folders from which code is run: only this user, or the system's administrator, may have written there."""

import os
import stat
from pathlib import Path


class NotPrivate(Exception):
    """Why what lies in a folder must not be run, in one sentence."""


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, with mode 0700, unless others may write on the way to it.

    Raises:
        NotPrivate: see `check_way`.
        OSError: it cannot be made.
    """
    missing, existing = [], folder
    while not existing.exists():
        missing.append(existing)
        existing = existing.parent
    check_way(existing)
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    if missing:
        check_way(folder)  # another user's process may have been faster


def check_way(folder: Path) -> None:
    """Refuse a folder whose content another user may have put there: the folder and each one above it must belong to this user or
    to the administrator, and others must not be able to replace what is in it.

    Windows has no owners and modes of this kind, and keeps the folders of users apart by itself: nothing is checked there.

    Raises:
        NotPrivate: names the folder and says what is wrong.
        OSError: it cannot be looked at.
    """
    if not hasattr(os, "geteuid"):
        return
    folder = folder.resolve()
    for part in (*reversed(folder.parents), folder):
        _check(part, part.stat(), is_sticky_safe=part != folder)


def check_private(folder: Path) -> None:
    """`check_way`, and the same for all that lies in the folder, at any depth.

    Raises:
        NotPrivate, OSError: see `check_way`. Links and devices are refused, too.
    """
    check_way(folder)
    if not hasattr(os, "geteuid"):
        return
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode) and not stat.S_ISREG(about.st_mode):
                raise NotPrivate(f"{path} is neither a file nor a folder, but a link or a device")
            _check(path, about)


def _check(path: Path, about: os.stat_result, is_sticky_safe: bool = False) -> None:
    user = os.geteuid()
    # The owner of "/" is the administrator, also where a container shows this one under another number.
    if about.st_uid not in (user, 0, os.stat("/").st_uid):
        raise NotPrivate(f"{path} belongs to another user (number {about.st_uid}; this one is {user})")
    writers = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_sticky_safe and about.st_mode & stat.S_ISVTX:
        return  # as /tmp: others can add to it, but not replace what is not theirs
    if writers == stat.S_IWGRP and _is_group_of_one(about.st_gid):
        return
    if writers:
        raise NotPrivate(f"other users may write to {path} (mode {stat.S_IMODE(about.st_mode):04o})")


def _is_group_of_one(group: int) -> bool:
    """Whether a group has this user as its only member, as the group has that many systems make for each user."""
    import grp  # not on Windows
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}
