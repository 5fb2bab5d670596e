"""Named implementations (backends) of multi-scale deformable attention, and the choice between them."""

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
_KERNELS = ("cpu", "triton")  # registered by an installed dino_hf


class Backend(NamedTuple):
    """One implementation, with the arguments and results of `ms_deform_attn` and `ms_deform_attn_fused`."""

    plain: Callable[..., Tensor]  # (value, shapes, locations, weights)
    fused: Callable[..., Tensor] | None = None  # (value, shapes, references, offsets, logits)


class BackendUnavailable(RuntimeError):
    """A backend cannot run here. The message gives the reason in one sentence."""


class _Entry(NamedTuple):
    load: Callable[[], Backend]
    device_type: str | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None  # dtypes of the values; None: any
    automatic: bool
    find_obstacle: Callable[[torch.device], str | None]  # see `register_backend`


_entries: dict[str, _Entry] = {}  # in the order of the automatic choice
_loaded: dict[str, Backend] = {}
_reasons: dict[str, str] = {}  # name -> reason why the backend could not be loaded
_trials: dict[tuple[str, str, int | None, torch.dtype], str | None] = {}  # -> reason why the trial failed, or None
_warned: set[tuple[str, ...]] = set()  # keys of warnings that were given
_loading = threading.RLock()  # a second thread waits until the first has built and imported a kernel
_named_in_block: ContextVar[str | None] = ContextVar("ms_deform_attn_backend", default=None)
_blocks: list[tuple[str, object]] = []  # open `use_backend` blocks of all threads, the newest last


def register_backend(
    name: str,
    load: Callable[[], Backend],
    device_type: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    automatic: bool = True,
    first: bool = False,
    find_obstacle: Callable[[torch.device], str | None] = lambda device: None,
) -> None:
    """Register a backend under a name.

    Args:
        load: returns the implementation; called on first use. Raises BackendUnavailable with the reason.
        device_type, dtypes: supported device type and dtypes of values; None for all.
        automatic: whether it may be chosen automatically.
        first: whether the automatic choice tries it before the backends registered so far.
        find_obstacle: returns the reason why the backend cannot run on a device of its type, or None if it can. A trial on the
            device follows (backend_trial.py).
    """
    entry = {name: _Entry(load, device_type, dtypes, automatic, find_obstacle)}
    others = {other: known for other, known in _entries.items() if other != name}
    _entries.clear()
    _entries.update(entry | others if first else others | entry)
    with _loading:
        _loaded.pop(name, None)
        _reasons.pop(name, None)
        for key in [key for key in _trials if key[0] == name]:
            del _trials[key]


def load_backend(name: str) -> Backend:
    """Load a backend on first use and return it.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: the backend cannot run here.
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
        except Exception as error:  # after any failure of a kernel, PyTorch's own operators still work
            logger.debug("The ms_deform_attn backend %r did not load", name, exc_info=True)
            _reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe_backends() -> dict[str, str | None]:
    """Name of each backend -> None if it can run here, or the reason why not.

    Loads all backends, builds kernels if needed, and tries each kernel on its device.
    """
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
    """Use this backend for all deformable attention within the block. It takes precedence over environment and configuration.

    The block applies to the whole process, because autograd runs backward passes and recomputes checkpointed layers in other
    threads. Only threads inside another block are not affected.

    Raises:
        ValueError, BackendUnavailable: see `load_backend`.
    """
    load_backend(name)
    token, block = _named_in_block.set(name), (name, object())
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)
        _named_in_block.reset(token)


@torch.compiler.assume_constant_result
def choose_backend(
    name: str | None, device_type: str, dtype: torch.dtype, index: int | None = None, must_run: bool = False
) -> str:
    """Choose the backend for values on a device.

    Precedence: `use_backend`, the environment variable DINO_HF_MS_DEFORM_ATTN, `name`, then the first backend that can run.
    Compiled code keeps the choice that was made when it was traced. A kernel is tried once for each device and dtype, in a small
    forward and backward pass. If it fails, it is not used, and there is one warning.

    Args:
        name: the backend that the model's configuration prefers. A configuration is used on many machines, so if this backend is
            unknown or cannot run, another backend is chosen with one warning.
        index: index of the device; None for the current device.
        must_run: raise an error if the backend `name` cannot run. A backend named by `use_backend` or the environment always must
            run.
    Raises:
        ValueError, BackendUnavailable: the backend named by the user is unknown, or cannot run on this device or with this dtype.
    """
    named, source = _named_by_user()
    if not named and must_run:
        named, source = name, ""
    if named:
        _require(named, source, device_type, index, dtype)
        return named
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # An exported program must not depend on a kernel installed here, nor on grid_sample, which many runtimes lack.
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
                f"{error} A slower backend is used; set {ENVIRONMENT_VARIABLE}=torch to silence this warning.",
            )
    raise ValueError(f"No ms_deform_attn backend supports {dtype} on {device_type!r}; known are {sorted(_entries)}.")


def _named_by_user() -> tuple[str | None, str]:
    """The backend named by `use_backend` or by the environment, and a prefix for error messages that names the source."""
    if block := _named_in_block.get():
        return block, ""
    with suppress(IndexError):  # another thread may close the last block at any moment
        return _blocks[-1][0], ""
    return os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or None, f"{ENVIRONMENT_VARIABLE}: "


def _require(name: str, source: str, device_type: str, index: int | None, dtype: torch.dtype) -> None:
    try:
        load_backend(name)
        if not _computes(name, device_type, dtype):
            raise ValueError(
                f"The ms_deform_attn backend {name!r} supports {_describe(name)}, not {dtype} on {device_type!r}; name "
                "another backend, or none for an automatic choice."
            )
        _try(name, device_type, index, dtype)
    except (ValueError, BackendUnavailable) as error:
        if source:
            raise type(error)(f"{source}{error}") from None
        raise


def _is_preference_met(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> bool:
    if name in _KERNELS and name not in _entries:
        return False  # the configuration names a kernel of dino_hf, and the shared model runs without dino_hf
    if name not in _entries:
        reason = f"which is unknown here (known are {sorted(_entries)})"
    elif not _computes(name, device_type, dtype):
        reason = f"which supports {_describe(name)}, not {dtype} on {device_type!r}"
    else:
        try:
            _try(name, device_type, index, dtype)
            return True
        except BackendUnavailable as error:
            reason = f"but: {error}"
    _warn_once(
        ("preference", name, reason),
        f"The model's configuration prefers the ms_deform_attn backend {name!r}, {reason.rstrip('.')}. Another backend is used.",
    )
    return False


def _warn_once(key: tuple[str, ...], sentence: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(sentence, DinoDetrWarning, stacklevel=4)


def _try(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> None:
    """Load a backend, and run its trial once for each device and dtype.

    Raises:
        BackendUnavailable: the backend cannot run there.
    """
    load_backend(name)
    if not _needs_trial(_entries[name], device_type):
        return
    key = name, device_type, index, dtype
    if key not in _trials:
        with _loading:
            if key not in _trials:  # unless another thread was first
                _trials[key] = _failed_trial(name, device_type, index, dtype)
    if _trials[key]:
        raise BackendUnavailable(f"The ms_deform_attn backend {name!r} cannot run here: {_trials[key]}.")


def _needs_trial(entry: _Entry, device_type: str) -> bool:
    """Whether a backend needs a trial: kernels always, PyTorch's own operators on devices other than CPU, CUDA and meta.

    On other devices the backward pass of `grid_sample` may be missing, as it was on MPS.
    """
    return entry.device_type is not None or device_type not in ("cpu", "cuda", "meta")


def _failed_trial(name: str, device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    if device_type == "cuda" and index is None:
        index = torch.cuda.current_device()
    device, backend = torch.device(device_type, index), _loaded[name]
    return _entries[name].find_obstacle(device) or reason_against(
        backend.plain, backend.fused, load_backend("reference").plain, device, dtype
    )


def _computes(name: str, device_type: str, dtype: torch.dtype) -> bool:
    entry = _entries[name]
    return entry.device_type in (None, device_type) and (entry.dtypes is None or dtype in entry.dtypes)


def _describe(name: str) -> str:
    entry = _entries[name]
    dtypes = "any dtype" if entry.dtypes is None else " and ".join(str(dtype) for dtype in entry.dtypes)
    return f"{dtypes} on {entry.device_type or 'any device'!r}"
