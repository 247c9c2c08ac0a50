"""What every launch needs: the sets as one array, the temperature as the kernels take it, the device they run on."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides, once


def one_array(sets: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and the strides (g, v, n, d) by which it reaches all sets: [G, N, D] each, of one dtype.

    Sets of equal strides whose addresses are in arithmetic progression, as two always are, are taken as they lie;
    others are stacked by one more launch.
    """
    first, *others = sets
    steps = [y.data_ptr() - x.data_ptr() for x, y in zip(sets[:-1], others, strict=True)]
    step = steps[0] if steps else 0
    alike = all(x.stride() == first.stride() for x in others)
    if not alike or any(s != step for s in steps) or step % first.element_size():
        first = torch.stack(sets)
        return first, (first.stride(1), first.stride(0), *first.stride()[2:])
    g, n, d = first.stride()
    return first, (g, step // first.element_size(), n, d)


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def temperature(tau: float | Tensor, x: Tensor) -> float | Tensor:
    """As a number, or a tensor on the device of x. A kernel's numbers are float32, so those of float64 are tensors."""
    if isinstance(tau, torch.Tensor):
        return tau.to(x.device, non_blocking=True)
    return tau if x.dtype != torch.float64 else torch.full((), tau, dtype=torch.float64, device=x.device)


def pointer(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A tensor without gaps; a kernel that was told there is none does not touch the one in its place."""
    return stand_in if x is None else x.contiguous()


# said in every launch, since Triton 3.10 will change its default: the tables of tiles were chosen with it
COMPILER_OPTIONS = dict(enable_fp_fusion=True)


def launch(kernel: Any, programs: int, first: Tensor, *arguments: Any, **settings: Any) -> None:
    on_device = torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](first, *arguments, **settings, **COMPILER_OPTIONS)
