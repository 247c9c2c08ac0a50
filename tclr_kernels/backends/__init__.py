"""THE dispatch: `backend=` argument, then TCLR_KERNELS_BACKEND, then the first backend that serves the device."""

import math
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..checks import environment
from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}  # in the order of preference


class Regime(NamedTuple):
    """Problems on a kind of device, up to so many rows V N of all groups together and so many features D."""

    device: str
    dtypes: tuple[torch.dtype, ...]  # of the rows; empty: any
    rows: float
    features: float
    order: tuple[str, ...]


# By default the first regime that holds the problem decides, and elsewhere the order of BACKENDS. On a GPU they are
# predictions, not measured: few rows are a matter of launches, which native has cheaper, many of tensor cores, of which
# Triton has the faster instructions; native has any for half precision.
HALF = torch.bfloat16, torch.float16
REGIMES = (
    Regime("cuda", HALF, 4096, 1024, ("native", "triton", "reference")),
    Regime("cuda", (), 2048, 1024, ("native", "triton", "reference")),
    Regime("cuda", (), math.inf, math.inf, ("triton", "native", "reference")),
)


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Which backends serve a device.

    device: a torch.device or its name; None is the current default device.
    Returns a dict: backend name -> None if it is usable there, else the reason why it is not.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    return {name: _why_not(name, device) for name in BACKENDS}


def _why_not(name: str, device: torch.device) -> str | None:
    """Why a backend does not serve a device; None where it does."""
    return BACKENDS[name].why_not(device)


# what torch.compiler.assume_constant_result does, which takes two seconds to import the compiler: it asks for the
# answer and does not trace how it is found, by looking for files and devices
_why_not._dynamo_marked_constant = True


def missing(device: torch.device) -> dict[str, str]:
    """The backends that should have kernels for a device and cannot serve it. Returns a dict: name -> the reason."""
    belonging = (name for name, backend in BACKENDS.items() if hasattr(backend, "belongs") and backend.belongs(device))
    return {name: reason for name in belonging if (reason := _why_not(name, device)) is not None}


_warned = set()


def _warn_of_missing(device_type: str) -> None:
    """Says once why the reference backend is the default on a device that should have kernels."""
    if device_type not in _warned:
        _warned.add(device_type)
        for name, reason in missing(torch.device(device_type)).items():
            warnings.warn(f"tclr_kernels computes on {device_type} without kernels: {name}: {reason}", stacklevel=5)


_warn_of_missing._dynamo_marked_constant = True  # as above


def choose(
    backend: str | None, device: torch.device, rows: int = 0, features: int = 0, dtype: torch.dtype | None = None
) -> str:
    """The backend's name. One named by argument or environment must serve the device; only the default falls back."""
    source = "backend" if backend is not None else "TCLR_KERNELS_BACKEND"
    backend = backend if backend is not None else environment("TCLR_KERNELS_BACKEND") or None
    if backend is None:
        for chosen in _order(device, rows, features, dtype):
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


def _order(device: torch.device, rows: int, features: int, dtype: torch.dtype | None) -> Iterable[str]:
    kind = device.type
    for regime in REGIMES if kind != "cpu" else ():
        fits = regime.device == kind and rows <= regime.rows and features <= regime.features
        if fits and (not regime.dtypes or dtype in regime.dtypes):
            return regime.order
    return BACKENDS
