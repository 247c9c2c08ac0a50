"""The definition of the operation in plain PyTorch: it stores the Gram matrix, and autograd differentiates it.

    S[g,(a,i),(c,j)] = <z[g,a,i], z[g,c,j]> / tau            z normalised rows, or the rows themselves
    neg[g,a,c,i]  = log sum_{j != i} exp S[g,(a,i),(c,j)]
    pos[g,a,c,i]  = S[g,(a,i),(c,i)],  c != a                 0 where a = c
    term[g,a,c,i] = softplus(logaddexp(neg[g,a,a,i], neg[g,a,c,i]) - pos[g,a,c,i]),  c != a        0 where a = c

With `cross` only the blocks between the first and the second half of the sets exist: elsewhere neg is -inf, pos and
term are 0, and the term is softplus(neg - pos).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: torch.device) -> None:
    return None


def unit_rows(z: Tensor) -> Tensor:
    """Rows z [..., D], scaled to length one. A row of zeros stays zero, and has gradient zero."""
    largest = z.detach().abs().amax(-1, keepdim=True)
    scaled = z / largest.where(largest != 0, 1)  # avoids overflow of |z|^2; z / |z| and its derivatives stay the same
    zero = largest == 0
    norm = scaled.masked_fill(zero, 1).norm(dim=-1, keepdim=True)
    return (scaled / norm).masked_fill(zero, 0)


def gram(sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    """term, neg, pos: [G, V, V, N] of the sets: V tensors [G, N, D]; tau: a float or a 0-d tensor.

    On the CPU all arithmetic is float64, since the weights of very confident pairs are below float32's range, but the
    gradients that they give to rows of small norm are not. Other devices may be slow in float64 or lack it, so the
    dtype there is that of the sets, and at least float32.
    """
    wide = torch.promote_types(sets[0].dtype, torch.float32)
    dtype = torch.float64 if sets[0].device.type == "cpu" else wide
    results = _gram(torch.stack([x.to(dtype) for x in sets], dim=1), tau, normalize, cross)
    return tuple(x.to(wide) for x in results)


def _gram(z: Tensor, tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z: [G, V, N, D]

    Diagonals are copied by indexing, since with the view `neg.diagonal()` the compiled gradient was wrong:
    torch.compile overwrites a tensor saved for the backward after its last use, even if a saved view of it is read
    later (`donated_buffer` in torch/_functorch/config.py, PyTorch 2.13). The masks compare integers, since inductor
    cannot generate code that compares two boolean index expressions.
    """
    if isinstance(tau, torch.Tensor):
        tau = tau.to(device=z.device, dtype=z.dtype)
    V, N = z.shape[1:3]
    z = unit_rows(z) if normalize else z
    rows = z.flatten(1, 2)
    S = (rows @ rows.mT / tau).unflatten(2, (V, N)).unflatten(1, (V, N)).transpose(2, 3)  # [G, V, V, N, N]
    a, i = torch.arange(V, device=z.device), torch.arange(N, device=z.device)
    half = a // ((V + 1) // 2)  # which half of the sets, 0 or 1
    paired = (half[:, None] != half if cross else a[:, None] != a)[:, :, None]  # [V, V, 1]
    pos = S[:, :, :, i, i].masked_fill(~paired, 0)
    if N == 1:  # without negatives neg is -inf and the term 0; the formula below would make NaN of -inf - (-inf)
        return 0 * (pos - pos.detach()), torch.full_like(pos, -torch.inf), pos
    neg = S.masked_fill(i[:, None] == i, -torch.inf).logsumexp(-1)
    negatives = neg if cross else torch.logaddexp(neg[:, a, a][:, :, None], neg)
    term = -F.logsigmoid(pos - negatives)  # F.softplus is not exact above its threshold
    return term.masked_fill(~paired, 0), neg.masked_fill(~paired, -torch.inf) if cross else neg, pos


class _Matrix:
    """The similarities S [G, A, C, n, K] of rows and columns, and masks that say what each candidate is."""

    def __init__(
        self,
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        tau: float | Tensor,
        normalize: bool,
        cross: bool,
        first: int,
        row_keys: Tensor | None,
        column_keys: Tensor | None,
    ) -> None:
        wide = torch.promote_types(columns[0].dtype, torch.float32)
        self.dtype = torch.float64 if columns[0].device.type == "cpu" else wide
        self.normalize = normalize
        # if rows and columns are the same, they are converted once, so that their two gradients are added in this dtype
        stacked = [torch.stack([x.to(self.dtype) for x in sets], dim=1) for sets in (columns, rows) if sets]
        stacked = [unit_rows(x) for x in stacked] if normalize else stacked
        self.z, self.r = stacked[0], stacked[-1]
        device = self.z.device
        self.tau = tau.to(device=device, dtype=self.dtype) if isinstance(tau, torch.Tensor) else tau
        (A, n), (C, K) = self.r.shape[1:3], self.z.shape[1:3]
        S = self.r.flatten(1, 2) @ self.z.flatten(1, 2).mT / self.tau
        self.S = S.unflatten(2, (C, K)).unflatten(1, (A, n)).transpose(2, 3)
        a, c, i, j = (torch.arange(size, device=device) for size in (A, C, n, K))
        there = a[:, None] // ((A + 1) // 2) != c // ((C + 1) // 2) if cross else a[:, None] == a[:, None]
        self.there = there[:, :, None, None]
        self.paired = self.there & (a[:, None] != c)[:, :, None, None]
        self.same_index = (i[:, None] + first == j) & (first >= 0)  # [n, K]
        self.left_out, self.positive = self.same_index, None
        if row_keys is not None and column_keys is not None:
            same_key = ((row_keys[:, :, None] == column_keys[:, None, :]) & (row_keys >= 0)[:, :, None])[:, None, None]
            itself = self.same_index & (a[:, None] == c)[:, :, None, None]
            self.left_out = self.same_index | same_key
            self.positive = same_key & ~itself & self.there

    def weights(self, of: Sequence[Tensor], turn: Callable[[Tensor], Tensor]) -> Tensor:
        """The weights W of the similarities in the gradient, for the anchors on one side.

        of: the outputs and upstream gradients of these anchors. turn: the identity if the anchors are the rows, or
        `_turned` if they are the columns.
        """
        S, positive = turn(self.S.detach()), None if self.positive is None else turn(self.positive)
        of = [x.to(self.dtype)[..., None] for x in of]
        if len(of) == 2:
            negatives, g_pairs = of
            return (-g_pairs * torch.sigmoid(negatives - S)).where(positive, 0)
        neg, g_neg, g_pos, *labelled = of
        W = (g_neg * (S - neg).exp()).where(turn(~self.left_out & self.there) & (g_neg != 0), 0)
        W = W + g_pos.where(turn(self.same_index & self.paired), 0)
        if labelled:
            pos_lse, g_pos_lse, g_spread, count = labelled
            share = (S - pos_lse).exp()
            off = (share - 1 / count).masked_fill(count == 1, 0)
            W = W + (g_pos_lse * share + g_spread * off).where(positive, 0)
        return W

    def gradients(self, sets: Sequence[Tensor], z: Tensor, dz: Tensor) -> list[Tensor]:
        """The gradients of the sets, from the gradients dz of their (normalised) rows z [G, V, N, D]."""
        dz = dz.view_as(z)
        if self.normalize:
            x = torch.stack([x.to(z.dtype) for x in sets], dim=1)
            largest = x.abs().amax(-1, keepdim=True)
            zero = largest == 0
            largest = largest.masked_fill(zero, 1)
            length = (x / largest).norm(dim=-1, keepdim=True).masked_fill(zero, 1)
            along = (z * dz).sum(-1, keepdim=True)
            dz = ((dz - z * along) / length / largest).masked_fill(zero, 0)
        return [d.to(x.dtype) for d, x in zip(dz.unbind(1), sets, strict=True)]


def rectangle(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    mean: bool = False,
    half: bool = False,
) -> tuple[Tensor, ...]:
    """neg, pos and, with keys, pos_lse, spread, count, as `tclr_kernels/general.py` defines them.

    `mean` is ignored, and so is `half` here and below.

    rows: sets [G, n, D], or no sets if they are the columns; columns: sets [G, K, D]; first: the column that has the
    index of the first row, or -1. The results have the dtype in which they are computed, see `gram`.
    """
    m = _Matrix(rows, columns, tau, normalize, cross, first, row_keys, column_keys)
    neg = m.S.masked_fill(m.left_out | ~m.there, -torch.inf).logsumexp(-1)
    pos = torch.zeros_like(neg)
    if first >= 0:
        i = torch.arange(m.S.shape[3], device=m.S.device)
        pos = m.S[:, :, :, i, i + first].masked_fill(~m.paired[..., 0], 0)
    if m.positive is None:
        return neg, pos
    pos_lse = m.S.masked_fill(~m.positive, -torch.inf).logsumexp(-1)
    count = m.positive.sum(-1)
    mean = m.S.masked_fill(~m.positive, 0).sum(-1) / count.clamp(min=1)
    return neg, pos, pos_lse, (pos_lse - mean).masked_fill(count < 2, 0), count.to(m.dtype)


def pairs(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    negatives: Tensor,
    half: bool = False,
) -> Tensor:
    """The sum of softplus(negatives - S) over the positives. negatives: [G, A, C, n]"""
    m = _Matrix(rows, columns, tau, normalize, cross, first, row_keys, column_keys)
    return (-F.logsigmoid(m.S - negatives[..., None])).masked_fill(~m.positive, 0).sum(-1)


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
    """The gradients of the sets on both sides, and <z, dz> of their rows, by the formula in `tclr_kernels/general.py`.

    of_rows, of_columns: the outputs and upstream gradients of the anchors on this side; empty if it has no anchors.
    """
    m = _Matrix(rows, columns, tau, normalize, cross, first, row_keys, column_keys)
    W = m.weights(of_rows, lambda x: x) if of_rows else torch.zeros_like(m.S)
    if of_columns:
        W = W + _turned(m.weights(of_columns, _turned))
    products = W * m.S
    of_side = products.sum((2, 4)), products.sum((1, 3))
    W = W.transpose(2, 3).flatten(3, 4).flatten(1, 2) / m.tau  # [G, A n, C K]
    if not rows:
        return m.gradients(columns, m.z, W @ m.z.flatten(1, 2) + W.mT @ m.r.flatten(1, 2)), [], sum(of_side)
    d_rows = m.gradients(rows, m.r, W @ m.z.flatten(1, 2)) if for_rows else []
    d_columns = m.gradients(columns, m.z, W.mT @ m.r.flatten(1, 2)) if for_columns else []
    return d_rows, d_columns, of_side[0] if for_rows else of_side[1]


def _turned(x: Tensor) -> Tensor:
    """Exchanges rows and columns, and the dimensions of their sets if x has these."""
    return x.mT if x.dim() < 4 else x.mT.transpose(-4, -3)
