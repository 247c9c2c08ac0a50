"""Preparation of the kernels' arguments, and a faster way to launch a kernel that is already compiled."""

import os
import struct
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton also reads this only once
# whether `launch` keeps compiled kernels; on AMD they depend on more properties of a tensor than `specialised` has
HOLDS = not INTERPRETED and torch.version.hip is None


def one_array(sets: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """The sets [G, N, D] as a grid in memory: (first set, (inner, outer stride, inner stride, strides of g, n, d)).

    Set a begins at a // inner * outer stride + a % inner * inner stride. Two sets always form such a grid, and so do
    the views of two tensors. If sets have different strides or form no grid, they are stacked, which takes a launch.
    """
    first, size = sets[0], sets[0].element_size()
    g, n, d = first.stride()
    places = [x.data_ptr() - first.data_ptr() for x in sets]
    inner, outer_step, step = grid_of(tuple(places))
    if outer_step % size or step % size or inner == 0 or any(x.stride() != (g, n, d) for x in sets):
        first = torch.stack(sets)
        return first, (len(sets), 0, *first.stride())
    return first, (inner, outer_step // size, step // size, g, n, d)


def grid_of(places: tuple[int, ...]) -> tuple[int, int, int]:
    """(inner, outer_step, step) with places[a] = a // inner * outer_step + a % inner * step; inner = 0 if none fit."""
    count = len(places)
    step = places[1] if count > 1 else 0
    inner = next((k for k, place in enumerate(places) if place != k * step), count)
    outer_step = places[inner] if inner < count else 0
    found = [k // inner * outer_step + k % inner * step for k in range(count)]
    return (inner if found == list(places) else 0), outer_step, step


def cdiv(size: int, part: int) -> int:
    """size / part, rounded up. triton.cdiv does the same, but takes several microseconds on the host."""
    return -(-size // part)


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def temperature(tau: float | Tensor, x: Tensor) -> float | int | Tensor:
    """tau as an argument of a kernel, see `inverse_of`. A kernel receives a float as float32, so for float64 sets it
    is passed as the integer with the same bits."""
    if isinstance(tau, torch.Tensor):
        return tau.to(x.device, non_blocking=True)
    return tau if x.dtype != torch.float64 else int.from_bytes(struct.pack("<d", tau), "little")


def pointer(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """x, contiguous. If x is None, another tensor takes its place, which the kernel does not read."""
    return stand_in if x is None else x.contiguous()


def upstream(
    g_term: Tensor | None, g_neg: Tensor | None, g_pos: Tensor | None, stand_in: Tensor
) -> tuple[list[Tensor], dict[str, Any]]:
    """The upstream gradients of term, neg and pos as arguments of a kernel, and constants that say which are given.

    g_term may be a single number, expanded to the shape of term; it is then passed without a copy.
    """
    one = g_term is not None and not any(g_term.stride())
    pointers = [g_term if one else pointer(g_term, stand_in), pointer(g_neg, stand_in), pointer(g_pos, stand_in)]
    kind = None if g_term is None else "one" if one else "each"
    return pointers, dict(TERM=kind, NEG=g_neg is not None, POS=g_pos is not None)


# set explicitly because Triton 3.10 changes the default, and the tile sizes were chosen with this value
COMPILER_OPTIONS = dict(enable_fp_fusion=True)
_held: dict[Hashable, tuple[Any, ...]] = {}  # everything that a kernel is compiled for -> the compiled kernel


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Starts a kernel on the device of its first argument, on the current stream.

    settings: the kernel's constants, which follow the arguments in its signature, and options of the compiler.

    In each call, Triton searches for the compiled kernel, which takes longer than the launch itself. So compiled
    kernels are kept here, and later calls launch them directly, unless hooks are set that Triton's launch has to call.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, *arguments, **settings)
        return
    modes = _modes(kernel)
    if modes is None:
        kernel[(programs,)](*arguments, **settings, **COMPILER_OPTIONS)
        return
    key = id(kernel), device.index, *modes, *settings, *settings.values(), *specialised(arguments)
    held = _held.get(key)
    if held is None:
        compiled = kernel[(programs,)](*arguments, **settings, **COMPILER_OPTIONS)
        if compiled is None:  # a hook of Triton's compiler prevented the compilation
            return
        constants = [settings[name] for name in kernel.arg_names[len(arguments) :]]
        metadata = compiled.function, compiled.packed_metadata, None, None, None  # without hooks and their metadata
        _held[key] = compiled, metadata, constants
        return
    compiled, metadata, constants = held
    stream = driver.active.get_current_stream(device.index)
    compiled.run(programs, 1, 1, stream, *metadata, *arguments, *constants)


def _modes(kernel: Any) -> tuple[Hashable, ...] | None:
    """The settings of Triton that may change at any time and require another compilation of a kernel.

    None if Triton's own launch must be used, because hooks are set that it calls, as profilers do.
    """
    runtime, compilation = knobs.runtime, knobs.compilation
    if not HOLDS or kernel.pre_run_hooks or runtime.add_stages_inspection_hook is not None:
        return None
    # `calls` lists the functions of a hook; a hook without it was replaced by the user
    if getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True):
        return None
    return runtime.debug, compilation.instrumentation_mode, getattr(compilation, "fpsan_homomorphic_casts", None)


def specialised(arguments: Sequence[int | float | Tensor]) -> list[Hashable]:
    """The properties of arguments that Triton compiles a kernel for. Arguments equal in these can share a kernel.

    They are whether an int is 1, divisible by 16, or wider than 32 bits, and the dtype and the alignment of a tensor.
    """
    return [
        (x % 16 == 0 if 1 < x < 1 << 31 else (x == 1, x % 16 == 0, x.bit_length() // 32, x < 0))
        if (kind := type(x)) is int
        else (float if kind is float else x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,))
        for x in arguments
    ]
