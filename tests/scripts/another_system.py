"""The package and its commands where the parts of Python that only Unix has are missing: another_system.py FOLDER.

Other packages look at the real system, so the parts are hidden from the modules of this package alone, or once all are imported.
"""

import builtins
import importlib.util
import os
import pkgutil
import shutil
import signal
import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
MODULES = {"fcntl", "resource", "grp", "pwd", "termios", "pty"}
OF_OS = ("fork", "killpg", "getuid", "geteuid", "getgid", "setsid", "sched_getaffinity", "mkfifo", "uname", "statvfs")
OF_OS += ("getloadavg", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "chown", "sysconf")
OF_SIGNAL = ("SIGHUP", "SIGKILL", "SIGALRM", "alarm", "pause", "setitimer", "SIGCHLD")

real_import = builtins.__import__


def import_without(name, globals=None, *arguments, **settings):
    if name in MODULES and str((globals or {}).get("__name__")).startswith("dino_hf"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real_import(name, globals, *arguments, **settings)


builtins.__import__ = import_without

from typer.testing import CliRunner  # noqa: E402

import dino_hf  # noqa: E402
from dino_hf.cli.app import app  # noqa: E402
from dino_hf.common.output_folders import replace_folder  # noqa: E402
from dino_hf.run.plan import _usable_cores  # noqa: E402
from dino_hf.training.checkpoint_files import sync_to_disk  # noqa: E402

names = [one.name for one in pkgutil.walk_packages(dino_hf.__path__, "dino_hf.") if not one.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
for owner, hidden in ((os, OF_OS), (signal, OF_SIGNAL)):
    for name in hidden:
        if hasattr(owner, name):
            delattr(owner, name)

shutil._use_fd_functions = False  # as on Windows: otherwise `shutil.rmtree` needs what is hidden

for name in names:  # once more, beside the module that is in use: what runs at import needs nothing that is hidden
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def call(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.exit_code, result.output, result.exception)
    return result.output


assert "dino-hf" in call("--version")
call("scenes", FOLDER / "scenes", "--num-train", 3, "--num-validation", 2)
call("doctor", FOLDER / "scenes", "--fix", FOLDER / "fixed")
call("augment", FOLDER / "scenes", "--output", FOLDER / "a.png", "--num-images", 2, "--num-samples", 2)
call("env")
assert _usable_cores() >= 1
with replace_folder(FOLDER / "out") as scratch:
    (scratch / "a").touch()
sync_to_disk(FOLDER / "scenes")
