"""THE dispatch: `backend=` argument, then TCLR_KERNELS_BACKEND, then the first backend that serves the device."""

import functools
import math
import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch

from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}  # in the order of preference


class Regime(NamedTuple):
    """Problems on a kind of device, up to so many rows V N of all groups together and so many features D."""

    kind: str
    dtypes: tuple[torch.dtype, ...]  # of the rows; empty: any
    rows: float
    features: float
    order: tuple[str, ...]


# By default the first regime that holds the problem decides, and elsewhere the order of BACKENDS. They were measured on
# an H100 (benchmarks/results/operation-*.csv). Few rows cost what their launches cost the host, of which native's are
# cheaper; many are a matter of tensor cores, which Triton uses better but on Hopper, where native has kernels of its
# own for unit rows of half precision, of 65 to 256 features.
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
    backend: str | None,
    device: torch.device,
    rows: int = 0,
    features: int = 0,
    dtype: torch.dtype | None = None,
    unit_rows: bool = False,
) -> str:
    """The backend's name. One named by argument or environment must serve the device; only the default falls back.

    unit_rows: whether the problem is sets of normalised rows against each other, for which there are further kernels.
    """
    source = "backend" if backend is not None else "TCLR_KERNELS_BACKEND"
    backend = backend if backend is not None else os.environ.get("TCLR_KERNELS_BACKEND") or None
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
    on_hopper = unit_rows and device.type == "cuda" and _is_hopper(device)
    kinds = (device.type, "hopper") if on_hopper else (device.type,)
    for regime in REGIMES:
        fits = regime.kind in kinds and rows <= regime.rows and features <= regime.features
        if fits and (not regime.dtypes or dtype in regime.dtypes):
            return regime.order
    return BACKENDS


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    usable = torch.version.hip is None and torch.cuda.is_available()
    return usable and torch.cuda.get_device_capability(device) == HOPPER


_is_hopper._dynamo_marked_constant = True  # as above
