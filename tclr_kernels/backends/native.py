"""The compiled kernels, by PyTorch's own dispatcher: `torch.ops.tclr_kernels.*`, built from `csrc/`.

`_C` holds the operators and what they are on the CPU; `_cuda.so`, built where nvcc is, what they are on CUDA devices.
"""

import ctypes
import functools
from pathlib import Path

import torch

from ..checks import tf32_allowed
from . import cuda

try:
    import tclr_kernels._C as _C  # registers the operators
except ImportError as error:
    _C = None
    _missing = f"the compiled extension is not usable: {error}"

CUDA = Path(__file__).parents[1] / "_cuda.so"


def why_not(device):
    if _C is None:
        return _missing
    if device.type == "cuda":
        return cuda.why_not(device) or _load_cuda()
    if device.type != "cpu":
        return f"it has no kernels for device type {device.type!r}"
    return None


@functools.cache
def _load_cuda():
    """Registers the CUDA kernels; returns None, or the reason why there are none."""
    if not CUDA.exists():
        return "the CUDA kernels are not built: TCLR_KERNELS_CUDA=1 pip install -v --no-build-isolation tclr-kernels"
    try:
        torch.ops.load_library(str(CUDA))
    except OSError as error:
        return f"the CUDA kernels cannot be loaded by PyTorch {torch.__version__}, wanted 2.11 or newer: {error}"
    return None


def cuda_targets():
    """What the CUDA kernels were compiled for, as TCLR_KERNELS_CUDA_ARCHS named it; "" where there are none."""
    if not CUDA.exists() or _load_cuda() is not None:
        return ""
    name = ctypes.CDLL(str(CUDA)).tclr_kernels_cuda_targets
    name.restype = ctypes.c_char_p
    return name().decode()


def forward(sets, tau, normalize, cross):
    return torch.ops.tclr_kernels.gram_forward(sets, *_split(tau), normalize, cross, tf32_allowed())


def backward(sets, tau, normalize, cross, neg, pos, g_term, g_neg, g_pos):
    gradients = g_term, g_neg, g_pos
    call = torch.ops.tclr_kernels.gram_backward
    return call(sets, *_split(tau), normalize, cross, neg, pos, *gradients, tf32_allowed())


def objective(g, s, x, tau, normalize, scales, weights, gradient):
    return torch.ops.tclr_kernels.objective(g, s, x, *_split(tau), normalize, scales, weights, gradient)


def objective_backward(g, s, x, tau, normalize, scales, weights, kept, upstream):
    call = torch.ops.tclr_kernels.objective_backward
    return call(g, s, x, *_split(tau), normalize, scales, weights, kept, upstream)


def _split(tau):
    """The temperature as the operators take it: a tensor that is never read on the host, or a float."""
    return (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)


def register_fakes(namespace):
    """What the operators return, without values, for the compiler to trace."""

    @torch.library.register_fake(f"{namespace}::gram_forward")
    def _(sets, tau, tau_value, normalize, cross, tf32=False):
        G, N, _ = sets[0].shape
        V = len(sets)
        dtype = torch.promote_types(sets[0].dtype, torch.float32)
        return tuple(sets[0].new_empty(G, V, V, N, dtype=dtype) for _ in range(3))

    @torch.library.register_fake(f"{namespace}::gram_backward")
    def _(sets, tau, tau_value, normalize, cross, neg, pos, g_term, g_neg, g_pos, tf32=False):
        G, N, _ = sets[0].shape
        dz = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sets]
        return dz, neg.new_empty(G, len(sets), N)

    @torch.library.register_fake(f"{namespace}::objective")
    def _(g, s, x, tau, tau_value, normalize, scales, weights, gradient):
        dtype = torch.promote_types(x.dtype, torch.float32)
        kept = [z.new_empty(z.shape, dtype=dtype) for z in (g, s, x)] + [x.new_empty((), dtype=dtype)]
        return [x.new_empty((), dtype=dtype) for _ in range(5)], kept if gradient else []

    @torch.library.register_fake(f"{namespace}::objective_backward")
    def _(g, s, x, tau, tau_value, normalize, scales, weights, kept, upstream):
        gradients = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (g, s, x)]
        return [*gradients, torch.empty_like(upstream)]


if _C is not None:
    register_fakes("tclr_kernels")
