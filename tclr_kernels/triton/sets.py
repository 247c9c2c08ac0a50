"""What every launch needs: the sets as one array, the temperature as the kernels take it, the device they run on."""

import os
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides, once
# whether compiled kernels are kept: AMD's are compiled for more properties of a tensor than `specialised` knows
HOLDS = not INTERPRETED and torch.version.hip is None


def one_array(sets: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor, and by what it reaches all sets, [G, N, D] each: how many sets a row of sets has, and the strides of
    these rows, of the sets in a row, and of g, n, d.

    Sets of equal strides are taken as they lie where their addresses are those of such rows, as of two always, or of
    the sets of two tensors; others are stacked by one more launch.
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
    """(inner, outer_step, step): place a is a // inner * outer_step + a % inner * step; inner 0: there are none"""
    count = len(places)
    step = places[1] if count > 1 else 0
    inner = next((k for k, place in enumerate(places) if place != k * step), count)
    outer_step = places[inner] if inner < count else 0
    found = [k // inner * outer_step + k % inner * step for k in range(count)]
    return (inner if found == list(places) else 0), outer_step, step


def cdiv(size: int, part: int) -> int:
    """As Triton's, which takes several microseconds on the host: it is made for kernels."""
    return -(-size // part)


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


def upstream(
    g_term: Tensor | None, g_neg: Tensor | None, g_pos: Tensor | None, stand_in: Tensor
) -> tuple[list[Tensor], dict[str, Any]]:
    """What arrives at term, neg and pos, as pointers, and which of it is given; of term perhaps one number for all."""
    one = g_term is not None and not any(g_term.stride())
    pointers = [g_term if one else pointer(g_term, stand_in), pointer(g_neg, stand_in), pointer(g_pos, stand_in)]
    kind = None if g_term is None else "one" if one else "each"
    return pointers, dict(TERM=kind, NEG=g_neg is not None, POS=g_pos is not None)


# said in every launch, since Triton 3.10 will change its default: the tables of tiles were chosen with it
COMPILER_OPTIONS = dict(enable_fp_fusion=True)
_held: dict[Hashable, tuple[Any, ...]] = {}  # what launches have in common -> what starts the kernel


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Starts a kernel on the device of its first argument, on the current stream.

    settings: the kernel's constants, which its signature has after all arguments, and options of the compiler.
    Triton looks for the compiled kernel of a call anew each time, which takes longer than the launch itself. Here it is
    kept by what it was compiled for, and started directly by later calls, unless someone watches Triton's own way.
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
    alike = id(kernel), device.index, *modes, *settings, *settings.values(), *specialised(arguments)
    held = _held.get(alike)
    if held is None:
        compiled = kernel[(programs,)](*arguments, **settings, **COMPILER_OPTIONS)
        if compiled is None:  # a hook of the compiler wanted nothing compiled
            return
        constants = [settings[name] for name in kernel.arg_names[len(arguments) :]]
        what = compiled.function, compiled.packed_metadata, None, None, None  # no hooks, and no data for them
        _held[alike] = compiled, what, constants
        return
    compiled, what, constants = held
    stream = driver.active.get_current_stream(device.index)
    compiled.run(programs, 1, 1, stream, *what, *arguments, *constants)


def _modes(kernel: Any) -> tuple[Hashable, ...] | None:
    """What may be set at any time and makes Triton compile a kernel anew; None where its own way has to be gone.

    That is where functions are to be called at every launch, as profilers have them, or at every look for a kernel.
    """
    runtime, compilation = knobs.runtime, knobs.compilation
    if not HOLDS or kernel.pre_run_hooks or runtime.add_stages_inspection_hook is not None:
        return None
    # chains of functions, unless someone put a function in their place
    if getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True):
        return None
    return runtime.debug, compilation.instrumentation_mode, getattr(compilation, "fpsan_homomorphic_casts", None)


def specialised(arguments: Sequence[int | float | Tensor]) -> list[Hashable]:
    """All that Triton compiles a kernel for of its arguments, and more: what is alike by this is alike for Triton.

    It looks at whether an int is 1, divisible by 16, or wider than 32 bits, at a tensor's dtype and at its address.
    """
    return [
        (x % 16 == 0 if 1 < x < 1 << 31 else (x == 1, x % 16 == 0, x.bit_length() // 32, x < 0))
        if (kind := type(x)) is int
        else (float if kind is float else x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,))
        for x in arguments
    ]
