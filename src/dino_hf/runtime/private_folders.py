"""Check folders from which code is run: only this user or the administrator may be able to write there."""

import os
import stat
from pathlib import Path


class NotPrivate(Exception):
    """Code in a folder must not be run. The message is the reason, without a full stop."""


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, with mode 0700. Refuse if other users may write to an existing parent.

    Raises:
        NotPrivate: see `check_owners`.
        OSError: the folder cannot be created.
    """
    missing, existing = [], folder
    while not existing.exists():
        missing.append(existing)
        existing = existing.parent
    check_owners(existing)
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    if missing:
        check_owners(folder)  # another user's process may have made the folder first


def check_owners(folder: Path) -> None:
    """Refuse a folder whose content may come from another user.

    The folder and its parents must belong to this user or to the administrator, and other users must not be able to replace their
    content. Windows has no owners and modes of this kind, and protects the folders of users itself: nothing is checked there.

    Raises:
        NotPrivate: names the folder and the reason.
        OSError: the folder cannot be inspected.
    """
    if not hasattr(os, "geteuid"):
        return
    folder = folder.resolve()
    for part in (*reversed(folder.parents), folder):
        _check(part, part.stat(), is_sticky_safe=part != folder)


def check_private(folder: Path) -> None:
    """Like `check_owners`, also for all files and folders in the folder, at any depth. Links and devices are refused.

    Raises:
        NotPrivate, OSError: see `check_owners`.
    """
    check_owners(folder)
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
    # The owner of "/" is the administrator. In a container, this number may differ from 0.
    if about.st_uid not in (user, 0, os.stat("/").st_uid):
        raise NotPrivate(f"{path} belongs to another user (number {about.st_uid}; this one is {user})")
    writers = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if is_sticky_safe and about.st_mode & stat.S_ISVTX:
        return  # like /tmp: other users can add files, but not replace the files of others
    if writers == stat.S_IWGRP and _is_only_member(about.st_gid):
        return
    if writers:
        raise NotPrivate(f"other users may write to {path} (mode {stat.S_IMODE(about.st_mode):04o})")


def _is_only_member(group: int) -> bool:
    """Whether this user is the only member of a group. Many systems create a private group for each user."""
    import grp  # not on Windows
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}
