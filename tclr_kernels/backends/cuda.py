"""What the two backends with CUDA kernels want of a device."""

import functools

import torch

OLDEST = 8, 0  # compute capability: of older devices the kernels would spill registers, and lack bfloat16


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA or HIP device; None where they can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < OLDEST:
        return "the device has compute capability {}.{}: wanted {}.{} or newer".format(*found, *OLDEST)
    return None
