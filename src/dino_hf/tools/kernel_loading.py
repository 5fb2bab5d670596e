"""The kernel project in `kernels/` -> backends `cpu` and `triton` of deformable attention, built on first use.

Importing this registers them; nothing is built or imported until one is needed. It works with and without the `kernels`
library of Hugging Face, which can load the same builds.
"""

import atexit
import errno
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from ..attention_backends import Backend, BackendUnavailable, register_backend

logger = logging.getLogger(__name__)

PROJECT = "ms-deform-attn"


def kernel_sources() -> Path:
    """The folder of kernel projects: a part of the installed package, or beside `src` in a checkout."""
    installed = Path(__file__).parents[1] / "_kernels"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "kernels"


def cache_dir() -> Path:
    """Where builds are kept: $DINO_HF_CACHE, or dino_hf in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("DINO_HF_CACHE"):
        return Path(folder).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve() / "dino_hf"


def kernel_builder() -> ModuleType:
    """`kernels/build.py` as a module.

    Raises:
        BackendUnavailable: it is gone.
    """
    file = kernel_sources() / "build.py"
    if not file.is_file():
        raise BackendUnavailable(f"its sources are not at {file.parent}; install dino_hf again")
    return _import("_dino_hf_kernel_build", file)


def load_kernel(native: bool) -> ModuleType:
    """The kernel as a module, built if need be.

    Args:
        native: with the C++ kernel for CPUs; else only what needs no compiler.
    Raises:
        BackendUnavailable: why not.
    """
    builder, project = kernel_builder(), kernel_sources() / PROJECT
    identity = builder.kernel_id(project, native)
    if identity in sys.modules:
        return sys.modules[identity]
    try:
        variant = builder.find_variant(project, project / "build", native) or _build(builder, project, identity, native)
        return _import(identity, variant / "__init__.py")
    except builder.BuildError as error:
        raise BackendUnavailable(str(error)) from error
    except (OSError, ImportError) as error:  # no room, no right to write, a library that does not load
        raise BackendUnavailable(str(error)) from error


def _build(builder: ModuleType, project: Path, identity: str, native: bool) -> Path:
    try:
        # Operators live as long as the process, so their name is also the key of the cache; torch's version and ABI join it.
        folder = cache_dir() / "kernels" / f"{identity}-torch{torch.__version__}-{sys.platform}"
        if native and not folder.exists():
            logger.info("Building the deformable attention kernel for this machine, once; it takes some seconds.")
        return builder.build_variant(project, folder, native)
    except (OSError, RuntimeError) as error:
        # A home that cannot be written, as in some containers, or that nobody knows: build for this process only.
        if isinstance(error, OSError) and error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        folder = Path(tempfile.mkdtemp(prefix="dino_hf_kernels_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        logger.warning(
            "The cache cannot be written (%s), so the kernel is built again in every process; set DINO_HF_CACHE to a folder that "
            "can.",
            error,
        )
        return builder.build_variant(project, folder, native)


def _import(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
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


register_backend("cpu", _load_cpu, "cpu", (torch.float32, torch.bfloat16), first=True)
register_backend("triton", _load_triton, "cuda", (torch.float32, torch.float16, torch.bfloat16), first=True)
