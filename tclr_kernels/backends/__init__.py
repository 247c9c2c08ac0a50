"""Chooses the backend: the argument `backend=`, else TCLR_KERNELS_BACKEND, else the first that works on the device."""

import functools
import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..checks import environment
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}  # in the order of preference


class Regime(NamedTuple):
    """Problems of a limited size on a kind of device, and the order in which backends are tried for them."""

    kind: str
    dtypes: tuple[torch.dtype, ...]  # of the rows; empty: any
    rows: float  # at most, of all groups and sets together
    features: float  # at most
    order: tuple[str, ...]


# The first regime that includes a problem decides; without one, the order of BACKENDS. They follow from measurements on
# an H100 (benchmarks/results/operation-*.csv): with few rows the launches count, which cost the host less with native;
# with many rows the tensor cores count, which Triton uses better, except for normalised rows of half precision with 65
# to 256 features on Hopper, for which native has kernels of its own. They also serve 64 features, but there Triton is
# faster.
HALF = torch.bfloat16, torch.float16
NATIVE, TRITON = ("native", "triton", "reference"), ("triton", "native", "reference")
HOPPER = 9, 0  # compute capability
REGIMES = (
    Regime("hopper", HALF, 4096, 64, NATIVE),
    Regime("hopper", HALF, math.inf, 64, TRITON),
    Regime("hopper", HALF, math.inf, 256, NATIVE),
    Regime("cuda", HALF, 4096, 256, NATIVE),
    Regime("cuda", (), 2048, 512, NATIVE),
    Regime("cuda", (), math.inf, math.inf, TRITON),
)


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Tells which backends work on a device.

    device: a torch.device or its name; None is the current default device.
    Returns a dict from the name of each backend to None if it works there, else to the reason why it does not.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    return {name: _why_not(name, device) for name in BACKENDS}


def _why_not(name: str, device: torch.device) -> str | None:
    """The reason why a backend does not work on a device; None if it does."""
    return BACKENDS[name].why_not(device)


# The same as torch.compiler.assume_constant_result, which would import the compiler: that takes two seconds. With it,
# torch.compile calls the function and takes its result as a constant, and does not trace the search for files and
# devices.
_why_not._dynamo_marked_constant = True


def missing(device: torch.device) -> dict[str, str]:
    """The backends that should have kernels for a device and do not work there: {name: reason}."""
    belonging = (name for name, backend in BACKENDS.items() if hasattr(backend, "belongs") and backend.belongs(device))
    return {name: reason for name in belonging if (reason := _why_not(name, device)) is not None}


_warned = set()


def _warn_of_missing(device_type: str) -> None:
    """Warns once that the reference backend is used on a device that should have kernels, and says why."""
    if device_type not in _warned:
        _warned.add(device_type)
        for name, reason in missing(torch.device(device_type)).items():
            warnings.warn(f"tclr_kernels computes on {device_type} without kernels: {name}: {reason}", stacklevel=5)


_warn_of_missing._dynamo_marked_constant = True  # as above


def choose(
    backend: str | None,
    device: torch.device,
    rows: int = 0,
    features: int = 0,
    dtype: torch.dtype | None = None,
    unit_rows: bool = False,
) -> str:
    """The name of the backend. If the argument or the environment names one that does not work, it is an error.

    unit_rows: whether sets of normalised rows are contrasted with each other, for which there are further kernels.
    """
    source = "backend" if backend is not None else "TCLR_KERNELS_BACKEND"
    backend = backend if backend is not None else environment("TCLR_KERNELS_BACKEND") or None
    if backend is None:
        for chosen in _order(device, rows, features, dtype, unit_rows):
            if chosen in BACKENDS and _why_not(chosen, device) is None:
                break
        if chosen == "reference":
            _warn_of_missing(device.type)
        return chosen
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{source}: found {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    if (reason := _why_not(backend, device)) is not None:
        raise RuntimeError(f"{source}={backend!r} cannot serve tensors on {device}: {reason}")
    return backend


def _order(device: torch.device, rows: int, features: int, dtype: torch.dtype | None, unit_rows: bool) -> Iterable[str]:
    if device.type != "cuda":  # there are no regimes for others
        return BACKENDS
    kinds = ("cuda", "hopper") if unit_rows and _is_hopper(device) else ("cuda",)
    for regime in REGIMES:
        fits = regime.kind in kinds and rows <= regime.rows and features <= regime.features
        if fits and (not regime.dtypes or dtype in regime.dtypes):
            return regime.order
    return BACKENDS


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Whether native's kernels for Hopper run there: they need the device, and to be compiled for it."""
    usable = torch.version.hip is None and torch.cuda.is_available()
    return usable and torch.cuda.get_device_capability(device) == HOPPER and "9.0a" in native.cuda_targets().split()


_is_hopper._dynamo_marked_constant = True  # as above
