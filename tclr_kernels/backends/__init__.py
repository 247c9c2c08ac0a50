"""THE dispatch: `backend=` argument, then TCLR_KERNELS_BACKEND, then the first backend that serves the device."""

import math
import os
from typing import NamedTuple

import torch

from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}  # in the order of preference


class Regime(NamedTuple):
    """Problems on a kind of device, up to so many rows V N of all groups together and so many features D."""

    device: str
    dtypes: tuple  # of the rows; empty: any
    rows: float
    features: float
    order: tuple


# By default the first regime that holds the problem decides, and elsewhere the order of BACKENDS. On a GPU they are
# predictions, not measured: few rows are a matter of launches, which native has cheaper, many of tensor cores, of which
# Triton has the faster instructions; native has any for half precision.
HALF = torch.bfloat16, torch.float16
REGIMES = (
    Regime("cuda", HALF, 4096, 1024, ("native", "triton", "reference")),
    Regime("cuda", (), 2048, 1024, ("native", "triton", "reference")),
    Regime("cuda", (), math.inf, math.inf, ("triton", "native", "reference")),
)


def available_backends(device=None):
    """Which backends serve a device.

    device: a torch.device or its name; None is the current default device.
    Returns a dict: backend name -> None if it is usable there, else the reason why it is not.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    return {name: _why_not(name, device) for name in BACKENDS}


def _why_not(name, device):
    """Why a backend does not serve a device; None where it does."""
    return BACKENDS[name].why_not(device)


# what torch.compiler.assume_constant_result does, which takes two seconds to import the compiler: it asks for the
# answer and does not trace how it is found, by looking for files and devices
_why_not._dynamo_marked_constant = True


def choose(backend, device, rows=0, features=0, dtype=None):
    """The backend's name. One named by argument or environment must serve the device; only the default falls back."""
    source = "backend" if backend is not None else "TCLR_KERNELS_BACKEND"
    backend = backend if backend is not None else os.environ.get("TCLR_KERNELS_BACKEND") or None
    if backend is None:
        names = [name for name in _order(device, rows, features, dtype) if name in BACKENDS]
        return next(name for name in names if _why_not(name, device) is None)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{source}: found {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    if (reason := _why_not(backend, device)) is not None:
        raise RuntimeError(f"{source}={backend!r} cannot serve tensors on {device}: {reason}")
    return backend


def _order(device, rows, features, dtype):
    for regime in REGIMES:
        fits = rows <= regime.rows and features <= regime.features and (not regime.dtypes or dtype in regime.dtypes)
        if fits and regime.device == device.type:
            return regime.order
    return BACKENDS
