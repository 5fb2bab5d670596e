"""Implementations of multi-scale deformable attention, by name, and the choice between them."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .package_warning import DinoDetrWarning

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


_entries: dict[str, _Entry] = {}  # in the order in which the automatic choice tries them
_loaded: dict[str, Backend] = {}
_reasons: dict[str, str] = {}  # why a backend could not be loaded
_loading = threading.RLock()  # a module that one thread is building or importing is none yet for another
_chosen: ContextVar[str | None] = ContextVar("ms_deform_attn_backend", default=None)


def register_backend(
    name: str,
    load: Callable[[], Backend],
    device_type: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    automatic: bool = True,
    first: bool = False,
) -> None:
    """Make a backend known.

    Args:
        load: gives the implementation when it is needed for the first time; raises BackendUnavailable with the reason.
        device_type, dtypes: what it computes; None for everything.
        automatic: whether it may be chosen without being named.
        first: whether the automatic choice tries it before those that are known already.
    """
    entry = {name: _Entry(load, device_type, dtypes, automatic)}
    others = {other: known for other, known in _entries.items() if other != name}
    _entries.clear()
    _entries.update(entry | others if first else others | entry)
    _loaded.pop(name, None)
    _reasons.pop(name, None)


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


def describe_backends() -> dict[str, str | None]:
    """Name -> None where it can run, or why it cannot. Loads, and where needed builds, all of them."""
    for name in _entries:
        with suppress(BackendUnavailable):
            load_backend(name)
    return {name: _reasons.get(name) for name in _entries}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, all deformable attention is computed by this backend, whatever environment and configuration say.

    Gradient checkpointing computes attention again in the backward pass, which then belongs into the block too; so do threads
    that are started in it. `ms_deform_attn_backend` of the configuration has no such limits.

    Raises:
        ValueError, BackendUnavailable: see `load_backend`.
    """
    load_backend(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@torch.compiler.assume_constant_result
def choose_backend(name: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend for values on a device, in this order: `use_backend`, the environment variable DINO_HF_MS_DEFORM_ATTN,
    `name` (the model's configuration), and else the first that can compute it. Compiled code keeps the choice that was made
    when it was traced.

    Raises:
        ValueError, BackendUnavailable: one that was named is unknown, or cannot run, or not on this device or dtype.
    """
    if name in _KERNELS and name not in _entries:
        name = None  # a shared model that was saved with a kernel's name: its code travelled, the kernels did not
    named = _chosen.get() or os.environ.get(ENVIRONMENT_VARIABLE) or name
    if named:
        load_backend(named)
        if not _computes(named, device_type, dtype):
            raise ValueError(
                f"The ms_deform_attn backend {named!r} computes {_describe(named)}, not {dtype} on {device_type!r}; choose "
                "another, or none, which leaves the choice to the tensors."
            )
        return named
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # An exported program must not depend on a kernel that is installed here, nor on grid_sample, which runtimes have slow,
        # in part, or not at all.
        return "gather"
    for candidate, entry in _entries.items():
        if not entry.automatic or not _computes(candidate, device_type, dtype):
            continue
        known = candidate in _reasons
        try:
            load_backend(candidate)
            return candidate
        except BackendUnavailable as error:
            if not known:
                warnings.warn(
                    f"{error} A slower one takes its place; set {ENVIRONMENT_VARIABLE}=torch to choose that yourself.",
                    DinoDetrWarning,
                    stacklevel=2,
                )
    raise ValueError(f"No ms_deform_attn backend computes {dtype} on {device_type!r}; known are {sorted(_entries)}.")


def _computes(name: str, device_type: str, dtype: torch.dtype) -> bool:
    entry = _entries[name]
    return entry.device_type in (None, device_type) and (entry.dtypes is None or dtype in entry.dtypes)


def _describe(name: str) -> str:
    entry = _entries[name]
    dtypes = "any dtype" if entry.dtypes is None else " and ".join(str(dtype) for dtype in entry.dtypes)
    return f"{dtypes} on {entry.device_type or 'any device'!r}"
