"""The Triton backend: the kernels of `tclr_kernels/triton/` as registered operators `torch.ops.tclr_kernels_triton.*`.

Launches of the operation of `symmetric.py`: small groups take one in the forward and one in the backward. Other groups
take three in the forward (rows, sums, finish) and three in the backward (rows, coefficients, gradient). With more than
512 features, the backward takes blocks of rows, with two matrix products by the vendor's library and one launch for
each block, and one launch at the end. If the temperature is a tensor, it is never read on the host: one kernel is
launched for temperatures where exp S cannot overflow, another for all others, and one of the two returns at once. One
more launch is needed to stack sets that are not evenly spaced in memory, and to copy a strided upstream gradient
(except a single expanded number).

Launches of the general operation (`rectangle`, `pairs`, `rectangle_backward`): four in the forward (rows of both sides,
sums, finish), or three if the rows are the columns, and one more for the columns' mean, from which a backward without
gradients of the columns is computed. The backward takes six for one side (rows of both sides, units, coefficients,
gradient, join), and two more for the other side.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import cuda

OLDEST = 3, 6
DIVIDES = True  # `symmetric.py` explains it
NAMESPACE = "tclr_kernels_triton"


def version() -> str | None:
    """Triton's version, or None if Triton is not installed. Does not import it.

    It is read from the module's file, since the package has other names too, such as pytorch-triton-rocm.
    """
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return None
    said = re.search(r"""^__version__ = ['"](.*)['"]""", Path(found.origin).read_text(), re.MULTILINE)
    return said[1] if said else "of unknown version"


def _unusable() -> str | None:
    """The reason why Triton cannot be used, or None if it can."""
    if (found := version()) is None:
        return "Triton is not installed"
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    return None if numbers >= OLDEST else "Triton {} is too old: wanted {}.{} or newer".format(found, *OLDEST)


_missing = _unusable()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    if _missing is not None:
        return _missing
    if device.type == "cpu":
        needs = "on the CPU it needs Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
        return None if _interpreted else needs
    if device.type != "cuda":
        return f"it has no kernels for device type {device.type!r}"
    return "it is interpreted, TRITON_INTERPRET=1, which is for the CPU" if _interpreted else cuda.why_not(device)


def belongs(device: torch.device) -> bool:
    """Whether the package has kernels for this device, so that it is an installation fault if they cannot run."""
    return not _interpreted and device.type == "cuda" and cuda.why_not(device) is None


def forward(
    sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool, count: int = 1, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tclr_kernels_triton.gram_forward(sets, *_split(tau), normalize, cross, count, half)


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
    count: int = 1,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    call = torch.ops.tclr_kernels_triton.gram_backward
    return call(sets, *_split(tau), normalize, cross, neg, pos, g_term, g_neg, g_pos, count, half)


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
) -> tuple[Tensor, ...]:
    settings = *_split(tau), normalize, cross, first, row_keys, column_keys
    return torch.ops.tclr_kernels_triton.rectangle(rows, columns, *settings, mean, half)


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
    settings = *_split(tau), normalize, cross, first, row_keys, column_keys
    return torch.ops.tclr_kernels_triton.pairs(rows, columns, *settings, negatives, half)


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
    settings = *_split(tau), normalize, cross, first, row_keys, column_keys
    rest = of_rows, of_columns, for_rows, for_columns, half
    d_rows, d_columns, along = torch.ops.tclr_kernels_triton.rectangle_backward(rows, columns, *settings, *rest)
    return list(d_rows.unbind(0)), list(d_columns.unbind(0)), along


def _split(tau: float | Tensor) -> tuple[Tensor | None, float]:
    """The temperature as the two arguments of the operators: a tensor, never read on the host, or a float."""
    return (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)


def _path(sets):
    """The module with the kernels for sets of this size. The first call imports Triton."""
    from tclr_kernels.triton import large, small

    return small if small.serves(len(sets), sets[0].shape[1]) else large


def _forward(sets, tau, tau_value, normalize, cross, count=1, half=False):
    if sets[0].numel() == 0:
        return _empty_forward(sets, tau, tau_value, normalize, cross)
    return _path(sets).forward(sets, tau_value if tau is None else tau, normalize, cross, count, half)


def _backward(sets, tau, tau_value, normalize, cross, neg, pos, *gradients):
    if sets[0].numel() == 0:
        return _empty_backward(sets, tau, tau_value, normalize, cross, neg, pos, *gradients)
    tau = tau_value if tau is None else tau
    return _path(sets).backward(sets, tau, normalize, cross, neg.contiguous(), pos.contiguous(), *gradients)


def _empty_forward(sets, tau, tau_value, normalize, cross, count=1, half=False):
    G, N, _ = sets[0].shape
    V = len(sets)
    dtype = torch.promote_types(sets[0].dtype, torch.float32)
    return tuple(sets[0].new_empty(G, V, V, N, dtype=dtype) for _ in range(3))


def _empty_backward(sets, tau, tau_value, normalize, cross, neg, pos, *gradients):
    G, N, D = sets[0].shape
    V = len(sets)
    return sets[0].new_empty(V, G, N, D), neg.new_empty(G, V, N)


def _rectangle(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, mean, half=False):
    settings = normalize, cross, first, row_keys, column_keys
    if not _pairs_of_rows(rows, columns):
        neg, pos, pos_lse, *others = _empty_rectangle(rows, columns, tau, tau_value, *settings, mean)
        for x in (neg, pos_lse):
            x.fill_(-torch.inf)
        return neg, pos.zero_(), pos_lse, *(x.zero_() for x in others)
    from tclr_kernels.triton import rectangle

    return rectangle.forward(rows, columns, tau_value if tau is None else tau, *settings, mean, half)


def _pairs(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, negatives, half=False):
    if not _pairs_of_rows(rows, columns):
        return torch.zeros_like(negatives), torch.zeros_like(negatives)
    from tclr_kernels.triton import rectangle

    tau = tau_value if tau is None else tau
    return rectangle.pairs(rows, columns, tau, normalize, cross, first, row_keys, column_keys, negatives, half)


def _rectangle_backward(rows, columns, tau, tau_value, *others):
    of_rows, of_columns = others[5:7]
    if not (of_rows or of_columns) or not _pairs_of_rows(rows, columns):
        return tuple(x.zero_() for x in _empty_rectangle_backward(rows, columns, tau, tau_value, *others))
    from tclr_kernels.triton import rectangle

    return rectangle.backward(rows, columns, tau_value if tau is None else tau, *others)


def _pairs_of_rows(rows, columns):
    """Whether rows and columns have any entries, so that there are similarities to compute."""
    return all(size > 0 for sets in (rows or columns, columns) for size in sets[0].shape)


def _empty_rectangle(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, mean, half=False):
    like, C = (rows or columns)[0], len(columns)
    G, n, D = like.shape
    shape = G, len(rows or columns), C, n
    wide, real = torch.float64, torch.promote_types(like.dtype, torch.float32)
    outputs = [like.new_empty(shape, dtype=wide) for _ in range(2)]
    outputs += [like.new_empty(0 if row_keys is None else shape, dtype=wide) for _ in range(3)]
    return *outputs, like.new_empty((G, n, D) if mean else 0, dtype=real)


def _empty_pairs(rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, negatives, half=False):
    return torch.empty_like(negatives), torch.empty_like(negatives)


def _empty_rectangle_backward(
    rows, columns, tau, tau_value, normalize, cross, first, row_keys, column_keys, of_rows, of_columns, for_rows,
    for_columns, half=False,
):  # fmt: skip
    rows = rows or columns
    d_rows, d_columns = (
        sets[0].new_empty((len(sets), *sets[0].shape) if wanted else 0)
        for sets, wanted in ((rows, for_rows), (columns, for_columns))
    )
    sets = rows if for_rows else columns
    G, n, _ = sets[0].shape
    along = sets[0].new_empty((G, len(sets), n), dtype=torch.promote_types(sets[0].dtype, torch.float32))
    return d_rows, d_columns, along


_settings = "Tensor[] sets, Tensor? tau, float tau_value, bool normalize, bool cross"
_last = "SymInt count=1, bool half=False"
_gradients = "Tensor neg, Tensor pos, Tensor? g_term, Tensor? g_neg, Tensor? g_pos"
torch.library.define(f"{NAMESPACE}::gram_forward", f"({_settings}, {_last}) -> (Tensor, Tensor, Tensor)")
torch.library.define(f"{NAMESPACE}::gram_backward", f"({_settings}, {_gradients}, {_last}) -> (Tensor, Tensor)")
torch.library.impl(f"{NAMESPACE}::gram_forward", ("CPU", "CUDA"), _forward)
torch.library.impl(f"{NAMESPACE}::gram_backward", ("CPU", "CUDA"), _backward)
torch.library.register_fake(f"{NAMESPACE}::gram_forward", _empty_forward)
torch.library.register_fake(f"{NAMESPACE}::gram_backward", _empty_backward)

_settings = (
    "Tensor[] rows, Tensor[] columns, Tensor? tau, float tau_value, bool normalize, bool cross, int first, "
    "Tensor? row_keys, Tensor? column_keys"
)
_schemas = {
    "rectangle": f"({_settings}, bool mean, bool half=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "pairs": f"({_settings}, Tensor negatives, bool half=False) -> (Tensor, Tensor)",
    "rectangle_backward": f"({_settings}, Tensor[] of_rows, Tensor[] of_columns, bool for_rows, bool for_columns, "
    "bool half=False) -> (Tensor, Tensor, Tensor)",
}
_general = {  # operator -> its implementation, and its fake implementation, which only allocates outputs
    "rectangle": (_rectangle, _empty_rectangle),
    "pairs": (_pairs, _empty_pairs),
    "rectangle_backward": (_rectangle_backward, _empty_rectangle_backward),
}
for _name, (_call, _empty) in _general.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schemas[_name])
    torch.library.impl(f"{NAMESPACE}::{_name}", ("CPU", "CUDA"), _call)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _empty)
