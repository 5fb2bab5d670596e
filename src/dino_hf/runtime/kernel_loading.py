"""Loads the kernel project in `kernels/` as backends `cpu` and `triton` of deformable attention.

Importing this file registers the backends. They are built and imported on first use. This does not need the `kernels` library of
Hugging Face, but that library can load the same builds.
"""

import atexit
import contextlib
import errno
import importlib.util
import json
import logging
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

from ..common.output_folders import new_scratch, remove_leftovers, replace_file
from ..common.paths import NoCacheFolder, cache_dir
from ..common.text import first_line
from ..model import ms_deform_attn  # noqa: F401  (registers PyTorch's backends, so that the kernels come before them)
from ..model.attention_backends import Backend, BackendUnavailable, register_backend
from .private_folders import NotPrivate, check_private, make_private

logger = logging.getLogger(__name__)

PROJECT = "ms-deform-attn"
# Lowest compute capability that torch supports and for which the tests compile the kernels.
LOWEST_CAPABILITY = (7, 5)
FAILURE_HOURS = 24  # after this time a failed build is tried again, even if nothing has changed


def kernel_sources() -> Path:
    """The folder of kernel projects: inside the installed package, or beside `src` in a checkout."""
    installed = Path(__file__).parents[1] / "_kernels"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "kernels"


def _type_and_line(error: Exception) -> str:
    """Type and first line of an error. If a library fails to load, the type is more informative than the text."""
    return f"{type(error).__name__}: {first_line(error)}"


def kernel_builder() -> ModuleType:
    """`kernels/build.py` as a module.

    Raises:
        BackendUnavailable: the file does not exist.
    """
    file = kernel_sources() / "build.py"
    if not file.is_file():
        raise BackendUnavailable(f"its sources are not at {file.parent}; install dino_hf again")
    return _import("_dino_hf_kernel_build", file)


def load_kernel(native: bool) -> ModuleType:
    """Load the kernel as a module and build it if necessary.

    Args:
        native: True: include the C++ kernel for CPUs. False: only parts that need no compiler.
    Raises:
        BackendUnavailable: the kernel cannot be built or loaded.
    """
    builder, project = kernel_builder(), kernel_sources() / PROJECT
    identity = builder.kernel_id(project, native)
    if identity in sys.modules:
        return sys.modules[identity]
    if module := _load_ahead_of_time(builder, project, identity, native):
        return module
    try:
        return _load_or_build(builder, project, identity, native)
    except NotPrivate as error:
        reason = (
            f"its cache is not safe to run code from: {error}; set DINO_HF_CACHE to a folder that only you can write to"
        )
        raise BackendUnavailable(reason) from error
    except builder.BuildError as error:
        raise BackendUnavailable(str(error)) from error
    except OSError as error:  # disk full or no permission
        raise BackendUnavailable(str(error)) from error


def _load_ahead_of_time(builder: ModuleType, project: Path, identity: str, native: bool) -> ModuleType | None:
    """Load a build that `python kernels/build.py` wrote beside the sources. It is as trustworthy as the sources."""
    variant = builder.find_variant(project, project / "build", native)
    if variant is None:
        return None
    try:
        return _import(identity, variant / "__init__.py")
    except Exception as error:
        logger.warning(
            "The kernel in %s does not load, so it is built again elsewhere: %s", variant, _type_and_line(error)
        )
        return None


def _load_or_build(builder: ModuleType, project: Path, identity: str, native: bool) -> ModuleType:
    """Load the kernel from the cache. If the cached build does not load, delete it and build once more."""
    try:
        folder = _cache_folder(identity)
    except NoCacheFolder:
        folder = None
    if folder is not None and folder.exists():
        remove_leftovers(folder)
        remove_leftovers(folder.parent)
        check_private(folder)
        if module := _load_cached(builder, project, folder, identity, native):
            return module
    state = builder.compiler_state() if native else ""
    if reason := _remembered_failure(folder, state):
        raise builder.BuildError(reason)
    try:
        variant = _build(builder, project, identity, native)
    except builder.BuildError as error:
        if error.is_lasting:
            _remember_failure(folder, state, str(error))
        raise
    try:
        module = _import(identity, variant / "__init__.py")
    except Exception as error:
        # Delete the useless build, and remember the failure so that other processes do not repeat it.
        shutil.rmtree(variant, ignore_errors=True)
        reason = f"it was built, but does not load: {_type_and_line(error)}"
        _remember_failure(folder, state, reason)
        raise builder.BuildError(reason) from error
    return module


def _load_cached(builder: ModuleType, project: Path, folder: Path, identity: str, native: bool) -> ModuleType | None:
    variant = builder.find_variant(project, folder, native)
    if variant is None:
        return None
    try:
        return _import(identity, variant / "__init__.py")
    except Exception as error:
        logger.warning("The kernel in %s does not load, so it is built again: %s", variant, _type_and_line(error))
        shutil.rmtree(variant)
        return None


def _cache_folder(identity: str) -> Path:
    """Folder of a build in the cache. Its name contains the kernel id, the versions of torch and libc, and the system.

    Raises:
        NoCacheFolder: the user has no home folder.
    """
    return cache_dir() / "kernels" / f"{identity}-torch{torch.__version__}-{sys.platform}{_libc()}"


def _libc() -> str:
    """Suffix for the C library that a compiled kernel depends on: '-glibc2.36', '-musl'; '' on other systems than Linux."""
    if sys.platform != "linux":
        return ""
    name = "".join(platform.libc_ver())
    return f"-{name}" if name else "-musl" if "musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or "") else "-libc"


def _build(builder: ModuleType, project: Path, identity: str, native: bool) -> Path:
    """Build in the cache. If the cache cannot be written (containers, users without home), build for this process only."""
    try:
        folder = _cache_folder(identity)
        make_private(folder)
        _announce(builder, folder, native)
        scratch = new_scratch(folder / "build")
        try:
            return builder.build_variant(project, folder, native, mode=0o700, scratch=scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, NoCacheFolder) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        temporary = Path(tempfile.gettempdir())
        remove_leftovers(temporary)
        folder = new_scratch(temporary / "dino_hf_kernels")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        logger.warning(
            "The cache cannot be written (%s), so the kernel is built again in every process; set DINO_HF_CACHE to a folder that "
            "can.",
            error,
        )
        make_private(folder)
        return builder.build_variant(project, folder, native, mode=0o700)


def _announce(builder: ModuleType, folder: Path, native: bool) -> None:
    """Announce a build, because it takes many seconds."""
    if native and sys.platform != "win32" and builder.find_compiler() is not None:
        logger.warning(
            "Building the deformable attention kernel for this machine; it takes 15 seconds to a few minutes, once. It is kept in "
            "%s.",
            folder,
        )


def _failure_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".failed.json")


def _remembered_failure(folder: Path | None, state: str) -> str | None:
    """Reason of an earlier failure with the same compiler and sources; None if the build should be tried again."""
    if folder is None:
        return None
    file = _failure_file(folder)
    try:
        failure = json.loads(file.read_text(encoding="utf-8"))
        age = time.time() - failure["time"]
        if failure["compiler"] != state or not 0 <= age < FAILURE_HOURS * 3600:
            return None
        return f"{failure['reason']} (tried {age / 3600:.1f} hours ago; delete {file} to try again)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no file, or a damaged one
        return None


def _remember_failure(folder: Path | None, state: str, reason: str) -> None:
    if folder is None or not folder.parent.is_dir():
        return
    with contextlib.suppress(OSError):  # disk full: the next process tries again
        content = {"compiler": state, "time": time.time(), "reason": reason}
        with replace_file(_failure_file(folder)) as scratch:
            scratch.touch(0o600)
            scratch.write_text(json.dumps(content), encoding="utf-8")


def _import(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for part in [part for part in sys.modules if part == name or part.startswith(f"{name}.")]:
            del sys.modules[part]
        raise
    return module


def _load_cpu() -> Backend:
    return _backend(native=True)


def _load_triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed")
    if not torch.cuda.is_available():
        raise BackendUnavailable("there is no CUDA device")
    return _backend(native=False)


def _backend(native: bool) -> Backend:
    module = load_kernel(native)
    return Backend(module.ms_deform_attn, module.ms_deform_attn_fused)


def _triton_obstacle(device: torch.device) -> str | None:
    """Reason why the kernels cannot run on this GPU, or None."""
    if torch.version.hip is not None:  # AMD numbers capabilities differently, so only the trial of the kernel decides
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        has, wants = (".".join(map(str, version)) for version in (capability, LOWEST_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {has}, and the kernel needs {wants}"
    return None


register_backend("cpu", _load_cpu, "cpu", (torch.float32, torch.bfloat16), first=True)
register_backend(
    "triton",
    _load_triton,
    "cuda",
    (torch.float32, torch.float16, torch.bfloat16),
    first=True,
    find_obstacle=_triton_obstacle,
)
