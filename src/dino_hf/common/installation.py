"""The command that installs an extra of this package, from the place where the package came from."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname

_NAME = "dino_hf"


def install_command(extra: str) -> str:
    """The pip command that installs an extra of pyproject.toml from the same place as this package."""
    return f"pip install {_source(extra)}"


def with_install_command(error: ImportError, package: str, purpose: str, extra: str) -> ImportError:
    """An error with the command that installs `package`, if `error` says that it is missing. Else `error` itself.

    Args:
        purpose: the feature that needs the package, such as "ONNX files".
    """
    if (error.name or "").partition(".")[0] != package:
        return error
    return ImportError(f"{package} is not installed, but {purpose} need it: {install_command(extra)}.", name=error.name)


def _source(extra: str) -> str:
    origin = _direct_url()
    url = origin.get("url")
    if not isinstance(url, str):
        return shlex.quote(f"{_NAME}[{extra}]")
    if isinstance(version_control := origin.get("vcs_info"), dict):
        commit = version_control.get("commit_id")
        place = f"{version_control.get('vcs', 'git')}+{url}" + (f"@{commit}" if commit else "")
        return shlex.quote(f"{_NAME}[{extra}] @ {place}")
    if urlsplit(url).scheme != "file":
        return shlex.quote(f"{_NAME}[{extra}] @ {url}")
    path = url2pathname(urlsplit(url).path)
    folder = origin.get("dir_info")
    is_editable = isinstance(folder, dict) and folder.get("editable") is True
    return ("-e " if is_editable else "") + shlex.quote(f"{path}[{extra}]")


def _direct_url() -> dict:
    """The origin that pip recorded. Empty if this package came from a package index."""
    try:
        content = json.loads(distribution(_NAME).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
