"""Which devices the CUDA and Triton kernels run on."""

import functools

import torch

OLDEST = 8, 0  # compute capability; older devices have no bfloat16, and the kernels would spill registers there


@functools.cache
def why_not(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on a CUDA or HIP device, or None if they can."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < OLDEST:
        return "the device has compute capability {}.{}: wanted {}.{} or newer".format(*found, *OLDEST)
    return None
