"""THE dispatch: `backend=` argument, then TCLR_KERNELS_BACKEND, then the first backend that serves the device."""

import os

import torch

from . import native, reference, triton

BACKENDS = {"native": native, "triton": triton, "reference": reference}  # in the order of preference


def available_backends(device=None):
    """Which backends serve a device.

    device: a torch.device or its name; None is the current default device.
    Returns a dict: backend name -> None if it is usable there, else the reason why it is not.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    return {name: backend.why_not(device) for name, backend in BACKENDS.items()}


def choose(backend, device):
    """The backend's name. One named by argument or environment must serve the device; only the default falls back."""
    source = "backend" if backend is not None else "TCLR_KERNELS_BACKEND"
    backend = backend if backend is not None else os.environ.get("TCLR_KERNELS_BACKEND") or None
    if backend is None:
        return next(name for name, module in BACKENDS.items() if module.why_not(device) is None)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{source}: found {backend!r}, wanted one of {', '.join(map(repr, BACKENDS))}")
    if (reason := BACKENDS[backend].why_not(device)) is not None:
        raise RuntimeError(f"{source}={backend!r} cannot serve tensors on {device}: {reason}")
    return backend
