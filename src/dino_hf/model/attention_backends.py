"""Implementations of multi-scale deformable attention, by name, and the choice between them."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .backend_trial import reason_against
from .package_warning import DinoDetrWarning

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "DINO_HF_MS_DEFORM_ATTN"
_KERNELS = ("cpu", "triton")  # which an installed dino_hf registers


class Backend(NamedTuple):
    """One implementation; arguments and results are those of `ms_deform_attn` and `ms_deform_attn_fused`."""

    plain: Callable[..., Tensor]  # (value, shapes, locations, weights)
    fused: Callable[..., Tensor] | None = None  # (value, shapes, references, offsets, logits)


class BackendUnavailable(RuntimeError):
    """Why a backend cannot run here, in one sentence."""


class _Entry(NamedTuple):
    load: Callable[[], Backend]
    device_type: str | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None  # of values; None: any
    automatic: bool
    fits: Callable[[torch.device], str | None]  # why it cannot run on a device


_entries: dict[str, _Entry] = {}  # in the order in which the automatic choice tries them
_loaded: dict[str, Backend] = {}
_reasons: dict[str, str] = {}  # why a backend could not be loaded
_trials: dict[tuple[str, str, int | None, torch.dtype], str | None] = {}  # why a loaded backend cannot be relied on
_warned: set[tuple[str, ...]] = set()  # what was said once
_loading = threading.RLock()  # a module that one thread is building or importing is none yet for another
_chosen: ContextVar[str | None] = ContextVar("ms_deform_attn_backend", default=None)
_blocks: list[tuple[str, object]] = []  # of all threads that are open, the newest last


def register_backend(
    name: str,
    load: Callable[[], Backend],
    device_type: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    automatic: bool = True,
    first: bool = False,
    fits: Callable[[torch.device], str | None] = lambda device: None,
) -> None:
    """Make a backend known.

    Args:
        load: gives the implementation when it is needed for the first time; raises BackendUnavailable with the reason.
        device_type, dtypes: what it computes; None for everything.
        automatic: whether it may be chosen without being named.
        first: whether the automatic choice tries it before those that are known already.
        fits: why it cannot run on a device of its type, None where it can. A trial on the device follows (backend_trial.py).
    """
    entry = {name: _Entry(load, device_type, dtypes, automatic, fits)}
    others = {other: known for other, known in _entries.items() if other != name}
    _entries.clear()
    _entries.update(entry | others if first else others | entry)
    with _loading:
        _loaded.pop(name, None)
        _reasons.pop(name, None)
        for key in [key for key in _trials if key[0] == name]:
            del _trials[key]


def load_backend(name: str) -> Backend:
    """The implementation.

    Raises:
        ValueError: there is none of this name.
        BackendUnavailable: it cannot run here, and why.
    """
    if name not in _entries:
        raise ValueError(f"There is no ms_deform_attn backend {name!r}; known are {sorted(_entries)}.")
    if name not in _loaded and name not in _reasons:
        _load(name)
    if name in _reasons:
        raise BackendUnavailable(f"The ms_deform_attn backend {name!r} cannot run here: {_reasons[name]}.")
    return _loaded[name]


def _load(name: str) -> None:
    with _loading:
        if name in _loaded or name in _reasons:  # another thread was first
            return
        try:
            _loaded[name] = _entries[name].load()
        except BackendUnavailable as error:
            _reasons[name] = str(error)
        except Exception as error:  # any failure of the kernel: PyTorch's own operators still work
            logger.debug("The ms_deform_attn backend %r did not load", name, exc_info=True)
            _reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe_backends() -> dict[str, str | None]:
    """Name -> None where it can run, or why it cannot. Loads, and where needed builds, all of them, and tries each kernel on its
    device."""
    found = {}
    for name, entry in list(_entries.items()):
        try:
            load_backend(name)
            if entry.device_type is not None:
                _try(name, entry.device_type, None, entry.dtypes[0] if entry.dtypes else torch.float32)
        except BackendUnavailable:
            pass
        reasons = [_reasons.get(name), *(reason for key, reason in list(_trials.items()) if key[0] == name)]
        found[name] = next(filter(None, reasons), None)
    return found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, all deformable attention is computed by this backend, whatever environment and configuration say.

    This holds for the whole process: for the threads in which autograd runs backward passes and computes attention again that
    was checkpointed, and for any other thread that has no such block of its own.

    Raises:
        ValueError, BackendUnavailable: see `load_backend`.
    """
    load_backend(name)
    token, block = _chosen.set(name), (name, object())
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)
        _chosen.reset(token)


@torch.compiler.assume_constant_result
def choose_backend(
    name: str | None, device_type: str, dtype: torch.dtype, index: int | None = None, is_order: bool = False
) -> str:
    """The backend for values on a device, in this order: `use_backend`, the environment variable DINO_HF_MS_DEFORM_ATTN,
    `name`, and else the first that can compute it. Compiled code keeps the choice that was made when it was traced.

    A kernel is tried once for each device and dtype, in a small forward and backward pass. One that fails is left out, with one
    warning.

    Args:
        name: what the configuration of the model prefers. A configuration travels between machines: where this backend is unknown
            or cannot run, there is one warning and another one is chosen.
        index: of the device; None for the current one.
        is_order: `name` comes from the caller and not from a configuration. What the user orders, in a block, by the environment or
            so, must run or raise.
    Raises:
        ValueError, BackendUnavailable: one that was ordered is unknown, or cannot run, or not on this device or dtype.
    """
    ordered, source = _ordered_by_user()
    if not ordered and is_order:
        ordered, source = name, ""
    if ordered:
        _require(ordered, source, device_type, index, dtype)
        return ordered
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # An exported program must not depend on a kernel that is installed here, nor on grid_sample, which runtimes have slow,
        # in part, or not at all.
        return "gather"
    if name and _is_preference_met(name, device_type, index, dtype):
        return name
    for candidate, entry in list(_entries.items()):
        if not entry.automatic or not _computes(candidate, device_type, dtype):
            continue
        try:
            _try(candidate, device_type, index, dtype)
            return candidate
        except BackendUnavailable as error:
            _warn_once(
                (candidate, str(error)),
                f"{error} A slower one takes its place; set {ENVIRONMENT_VARIABLE}=torch to choose that yourself.",
            )
    raise ValueError(f"No ms_deform_attn backend computes {dtype} on {device_type!r}; known are {sorted(_entries)}.")


def _ordered_by_user() -> tuple[str | None, str]:
    """The backend of a block or of the environment, and what to call where it is from."""
    if block := _chosen.get():
        return block, ""
    with suppress(IndexError):  # another thread may close the last one at any moment
        return _blocks[-1][0], ""
    return os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or None, f"{ENVIRONMENT_VARIABLE}: "


def _require(name: str, source: str, device_type: str, index: int | None, dtype: torch.dtype) -> None:
    try:
        load_backend(name)
        if not _computes(name, device_type, dtype):
            raise ValueError(
                f"The ms_deform_attn backend {name!r} computes {_describe(name)}, not {dtype} on {device_type!r}; choose "
                "another, or none, which leaves the choice to the tensors."
            )
        _try(name, device_type, index, dtype)
    except (ValueError, BackendUnavailable) as error:
        if source:
            raise type(error)(f"{source}{error}") from None
        raise


def _is_preference_met(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> bool:
    if name in _KERNELS and name not in _entries:
        return False  # a shared model that was saved with a kernel's name: its code travelled, the kernels did not
    if name not in _entries:
        reason = f"which is unknown here (known are {sorted(_entries)})"
    elif not _computes(name, device_type, dtype):
        reason = f"which computes {_describe(name)}, not {dtype} on {device_type!r}"
    else:
        try:
            _try(name, device_type, index, dtype)
            return True
        except BackendUnavailable as error:
            reason = f"but: {error}"
    _warn_once(
        ("preference", name, reason),
        f"The model's configuration prefers the ms_deform_attn backend {name!r}, {reason.rstrip('.')}. Another one takes "
        "its place.",
    )
    return False


def _warn_once(key: tuple[str, ...], sentence: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(sentence, DinoDetrWarning, stacklevel=4)


def _try(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> None:
    """Load a backend, and run it once on a device before anything relies on it.

    Raises:
        BackendUnavailable: why it cannot run there.
    """
    load_backend(name)
    if not _needs_trial(_entries[name], device_type):
        return
    key = name, device_type, index, dtype
    if key not in _trials:
        with _loading:
            if key not in _trials:  # no other thread was first
                _trials[key] = _reason_against(name, device_type, index, dtype)
    if _trials[key]:
        raise BackendUnavailable(f"The ms_deform_attn backend {name!r} cannot run here: {_trials[key]}.")


def _needs_trial(entry: _Entry, device_type: str) -> bool:
    """Kernels do. PyTorch's own operators are known to be whole on CPUs and CUDA devices, and a meta device computes nothing;
    elsewhere the backward pass of `grid_sample` may be missing, as it was on MPS."""
    return entry.device_type is not None or device_type not in ("cpu", "cuda", "meta")


def _reason_against(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    if device_type == "cuda" and index is None:
        index = torch.cuda.current_device()
    device, backend = torch.device(device_type, index), _loaded[name]
    return _entries[name].fits(device) or reason_against(
        backend.plain, backend.fused, load_backend("reference").plain, device, dtype
    )


def _computes(name: str, device_type: str, dtype: torch.dtype) -> bool:
    entry = _entries[name]
    return entry.device_type in (None, device_type) and (entry.dtypes is None or dtype in entry.dtypes)


def _describe(name: str) -> str:
    entry = _entries[name]
    dtypes = "any dtype" if entry.dtypes is None else " and ".join(str(dtype) for dtype in entry.dtypes)
    return f"{dtypes} on {entry.device_type or 'any device'!r}"
