"""The backend of the compiled kernels, which are registered operators: `torch.ops.tclr_kernels.*`, from `csrc/`.

`_cpu.so` defines the operators and has their kernels for the CPU. `_cuda.so`, which is only built if nvcc is found, has
their kernels for CUDA devices.
"""

import ctypes
import functools
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import tf32_allowed
from . import cuda

PACKAGE = Path(__file__).parents[1]
CPU, CUDA = PACKAGE / "_cpu.so", PACKAGE / "_cuda.so"
OPERATORS = "gram_forward", "gram_backward", "reduced", "reduced_backward", "objective", "objective_backward"
OPERATORS += "rectangle", "pairs", "rectangle_backward", "labelled"
CPU_ONLY = ("labelled",)


def _load_cpu() -> str | None:
    """Registers the operators and the CPU kernels. Returns None, or the reason why they cannot be used."""
    if sys.platform != "linux":
        return f"it has no kernels for {sys.platform}"
    if not CPU.exists():
        return _not_built()
    try:
        torch.ops.load_library(str(CPU))
    except OSError as error:
        return f"the CPU kernels cannot be loaded by PyTorch {torch.__version__}, wanted 2.11 or newer: {error}"
    return _out_of_date(CPU, "CPU")


def _out_of_date(library: Path, key: str) -> str | None:
    """The reason why a loaded library does not fit this package: it was built from other sources. Or None."""
    for name in OPERATORS:
        if key != "CPU" and name in CPU_ONLY:
            continue
        operator = f"tclr_kernels::{name}"
        exists = hasattr(torch.ops.tclr_kernels, name)
        if not exists or not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            return (
                f"{library} has no operator {name!r}, so it was built from other sources than these: build it again, "
                "by `make setup` in a clone, else by installing the package again"
            )
    return None


def _not_built() -> str:
    installed = shadowed()
    if installed is None:
        # without these options, pip does nothing, or installs the cached wheel without kernels again
        return (
            "the CPU kernels are not built: install the package again, without TCLR_KERNELS_REQUIRE_NATIVE=0 and with "
            "pip's options --force-reinstall --no-deps --no-cache-dir"
        )
    reason = (
        f"the CPU kernels are not built in {PACKAGE}, which hides the installed package {installed}: run from another "
        "folder, or build them by `make setup`"
    )
    warnings.warn(reason, RuntimeWarning, stacklevel=2)
    return reason


def shadowed() -> Path | None:
    """The folder of an installed package with kernels that is not the imported one, or None."""
    for distribution in importlib.metadata.distributions(name="tclr-kernels"):
        folder = Path(distribution.locate_file("tclr_kernels")).resolve()
        if folder != PACKAGE.resolve() and (folder / CPU.name).exists():
            return folder
    return None


_missing = _load_cpu()


def why_not(device: torch.device) -> str | None:
    if _missing is not None:
        return _missing
    if device.type == "cuda":
        return cuda.why_not(device) or _load_cuda()
    if device.type != "cpu":
        return f"it has no kernels for device type {device.type!r}"
    return None


def belongs(device: torch.device) -> bool:
    """Whether this package supports such a device, so that missing kernels are a fault of the installation."""
    return sys.platform == "linux" and (
        device.type == "cpu" or (device.type == "cuda" and cuda.why_not(device) is None)
    )


def build_facts() -> dict[str, Any] | None:
    """How the CPU kernels were built, and the instruction set that they use here. None if there are no kernels."""
    if _missing is not None:
        return None
    call = ctypes.CDLL(str(CPU)).tclr_kernels_facts
    call.restype = ctypes.c_char_p
    facts = json.loads(call().decode())
    if "error" in facts:
        raise RuntimeError(facts["error"])
    return facts


@functools.cache
def _load_cuda() -> str | None:
    """Registers the CUDA kernels. Returns None, or the reason why they cannot be used."""
    if not CUDA.exists():
        return (
            "the CUDA kernels are not built: on a machine with nvcc, install the package from its sources by "
            "TCLR_KERNELS_CUDA=1 pip install -v ."
        )
    try:
        torch.ops.load_library(str(CUDA))
    except OSError as error:
        return f"the CUDA kernels cannot be loaded by PyTorch {torch.__version__}, wanted 2.11 or newer: {error}"
    return _out_of_date(CUDA, "CUDA")


def cuda_targets() -> str:
    """The targets of the CUDA kernels, as listed in TCLR_KERNELS_CUDA_ARCHS, or "" if there are no kernels."""
    if not CUDA.exists() or _load_cuda() is not None:
        return ""
    name = ctypes.CDLL(str(CUDA)).tclr_kernels_cuda_targets
    name.restype = ctypes.c_char_p
    return name().decode()


def forward(sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tclr_kernels.gram_forward(sets, *_split(tau), normalize, cross, tf32_allowed())


def backward(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    neg: Tensor,
    pos: Tensor,
    g_term: Tensor | None,
    g_neg: Tensor | None,
    g_pos: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    gradients = g_term, g_neg, g_pos
    call = torch.ops.tclr_kernels.gram_backward
    return call(sets, *_split(tau), normalize, cross, neg, pos, *gradients, tf32_allowed())


def reduced(
    inputs: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    one_sided: bool,
    factor: float,
    count: int,
    gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    settings = normalize, cross, one_sided, factor, count, gradient
    tf32 = inputs[0].is_cuda and tf32_allowed()
    return torch.ops.tclr_kernels.reduced.default(inputs, *_split(tau), *settings, tf32)


def reduced_backward(
    inputs: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    one_sided: bool,
    factor: float,
    count: int,
    kept: Sequence[Tensor],
    upstream: Tensor,
) -> list[Tensor]:
    settings = normalize, cross, one_sided, factor, count, kept, upstream
    tf32 = inputs[0].is_cuda and tf32_allowed()
    return torch.ops.tclr_kernels.reduced_backward.default(inputs, *_split(tau), *settings, tf32)


def rectangle(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    mean: bool,
    half: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = normalize, cross, first, row_keys, column_keys
    call = torch.ops.tclr_kernels.rectangle
    return call(rows, columns, *_split(tau), *settings, mean, half, tf32_allowed())


def pairs(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor,
    column_keys: Tensor,
    negatives: Tensor,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    settings = normalize, cross, first, row_keys, column_keys
    call = torch.ops.tclr_kernels.pairs
    return call(rows, columns, *_split(tau), *settings, negatives, half, tf32_allowed())


def rectangle_backward(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    of_rows: Sequence[Tensor],
    of_columns: Sequence[Tensor],
    for_rows: bool,
    for_columns: bool,
    half: bool = False,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    settings = normalize, cross, first, row_keys, column_keys
    rest = of_rows, of_columns, for_rows, for_columns, half, tf32_allowed()
    return torch.ops.tclr_kernels.rectangle_backward(rows, columns, *_split(tau), *settings, *rest)


def labelled(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float,
    normalize: bool,
    first: int,
    row_keys: Tensor,
    column_keys: Tensor,
    spread: bool,
    count: float,
    for_rows: bool,
    for_columns: bool,
) -> tuple[Tensor, list[Tensor]]:
    settings = tau, normalize, first, row_keys, column_keys, spread, count, for_rows, for_columns
    return torch.ops.tclr_kernels.labelled.default(rows, columns, *settings)


def objective(
    g: Tensor,
    s: Tensor,
    x: Tensor,
    tau: float | Tensor,
    normalize: bool,
    scales: list[float],
    weights: list[float],
    gradient: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    return torch.ops.tclr_kernels.objective(g, s, x, *_split(tau), normalize, scales, weights, gradient)


def objective_backward(
    g: Tensor,
    s: Tensor,
    x: Tensor,
    tau: float | Tensor,
    normalize: bool,
    scales: list[float],
    weights: list[float],
    kept: Sequence[Tensor],
    upstream: Tensor,
) -> list[Tensor]:
    call = torch.ops.tclr_kernels.objective_backward
    return call(g, s, x, *_split(tau), normalize, scales, weights, kept, upstream)


def _split(tau: float | Tensor) -> tuple[Tensor | None, float]:
    """The temperature as the operators take it: a tensor that is never read on the host, or a float."""
    return (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)


# Fake kernels, from which torch.compile learns the shapes and dtypes of what the operators return.


def _fake_gram_forward(sets, *_):
    G, N, _ = sets[0].shape
    V = len(sets)
    dtype = torch.promote_types(sets[0].dtype, torch.float32)
    return tuple(sets[0].new_empty(G, V, V, N, dtype=dtype) for _ in range(3))


def _fake_gram_backward(sets, tau, tau_value, normalize, cross, neg, *_):
    G, N, _ = sets[0].shape
    return _contiguous(*sets), neg.new_empty(G, len(sets), N)


def _fake_reduced(inputs, tau, tau_value, normalize, cross, one_sided, factor, count, gradient, tf32=False):
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    loss, *along = (inputs[0].new_empty((), dtype=dtype) for _ in range(1 if tau is None else 2))
    kept = [*(z.new_empty(z.shape, dtype=dtype) for z in inputs), *along]
    if inputs[0].is_cuda:  # there, neg and pos are kept instead
        (G, N) = (1, inputs[0].shape[-2]) if len(inputs) == 1 or inputs[0].dim() == 2 else inputs[0].shape[:2]
        V = len(inputs) if len(inputs) > 1 else len(inputs[0])
        kept = [inputs[0].new_empty(G, V, V, N, dtype=dtype) for _ in range(2)]
    return loss, kept if gradient else []


def _fake_reduced_backward(
    inputs, tau, tau_value, normalize, cross, one_sided, factor, count, kept, upstream, tf32=False
):
    along = [] if tau is None else [torch.empty_like(upstream)]
    return [*(z.new_empty(z.shape) for z in inputs), *along]


def _fake_rectangle(
    rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, mean, half=False, tf32=False
):
    anchors = rows or columns
    G, n, D = anchors[0].shape
    blocks = [columns[0].new_empty(G, len(anchors), len(columns), n, dtype=torch.float64) for _ in range(5)]
    if row_keys is None:
        blocks[2:] = [x.new_empty(0) for x in blocks[2:]]
    wide = torch.promote_types(columns[0].dtype, torch.float32)
    return *blocks, columns[0].new_empty(*((G, n, D) if mean else (0,)), dtype=wide)


def _fake_pairs(
    rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, negatives, half=False, tf32=False
):
    return tuple(_contiguous(negatives, negatives))


def _fake_rectangle_backward(
    rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, of_rows, of_columns, for_rows,
    for_columns, half=False, tf32=False,
):  # fmt: skip
    d_rows, d_columns = _contiguous(*(rows or columns) * for_rows), _contiguous(*columns * for_columns)
    along = rows or columns if for_rows else columns
    wide = torch.promote_types(columns[0].dtype, torch.float32)
    G, n, _ = along[0].shape
    return d_rows, d_columns, along[0].new_empty(G, len(along), n, dtype=wide)


def _fake_labelled(rows, columns, tau, normalize, first, row_keys, column_keys, spread, count, for_rows, for_columns):
    wide = torch.promote_types(columns[0].dtype, torch.float32)
    sets = [*(rows or columns) * for_rows, *columns * for_columns]
    return columns[0].new_empty((), dtype=wide), [z.new_empty(z.shape, dtype=wide) for z in sets]


def _fake_objective(g, s, x, tau, tau_value, normalize, scales, weights, gradient):
    dtype = torch.promote_types(x.dtype, torch.float32)
    kept = [z.new_empty(z.shape, dtype=dtype) for z in (g, s, x)] + [x.new_empty((), dtype=dtype)]
    return [x.new_empty((), dtype=dtype) for _ in range(5)], kept if gradient else []


def _fake_objective_backward(g, s, x, tau, tau_value, normalize, scales, weights, kept, upstream):
    return [*_contiguous(g, s, x), torch.empty_like(upstream)]


def _contiguous(*tensors):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def register_fakes(namespace: str) -> None:
    """Registers the fake kernel of every operator."""
    for name in OPERATORS:
        torch.library.register_fake(f"{namespace}::{name}", globals()[f"_fake_{name}"])


if _missing is None:
    register_fakes("tclr_kernels")
