"""The definition, in plain PyTorch: it materialises the Gram matrix and is differentiated by plain autograd.

    S[g,(a,i),(c,j)] = <z[g,a,i], z[g,c,j]> / tau            z normalised rows, or the rows themselves
    neg[g,a,c,i]  = log sum_{j != i} exp S[g,(a,i),(c,j)]
    pos[g,a,c,i]  = S[g,(a,i),(c,i)],  c != a                 0 where a = c
    term[g,a,c,i] = softplus(logaddexp(neg[g,a,a,i], neg[g,a,c,i]) - pos[g,a,c,i]),  c != a        0 where a = c

With `cross` only the blocks between the first and the second half of the sets exist: elsewhere neg is -inf, pos and
term are 0, and the term is softplus(neg - pos).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: torch.device) -> None:
    return None


def unit_rows(z: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero and takes no gradient. z: [..., D]"""
    largest = z.detach().abs().amax(-1, keepdim=True)
    scaled = z / largest.where(largest != 0, 1)  # z / |z| does not depend on this scale, so neither do its derivatives
    zero = largest == 0
    norm = scaled.masked_fill(zero, 1).norm(dim=-1, keepdim=True)
    return (scaled / norm).masked_fill(zero, 0)


def gram(sets: Sequence[Tensor], tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    """term, neg, pos: [G, V, V, N] of the sets: V tensors [G, N, D]; tau: a float or a 0-d tensor.

    On the CPU all arithmetic is float64: the weights of very confident pairs lie below float32's range, the gradients
    they give to small rows do not. Elsewhere float64 may be slow or missing, and it is the sets' own, float32 at least.
    """
    wide = torch.promote_types(sets[0].dtype, torch.float32)
    dtype = torch.float64 if sets[0].device.type == "cpu" else wide
    results = _gram(torch.stack([x.to(dtype) for x in sets], dim=1), tau, normalize, cross)
    return tuple(x.to(wide) for x in results)


def _gram(z: Tensor, tau: float | Tensor, normalize: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z: [G, V, N, D]

    Diagonals are copied by an index, not taken as views. torch.compile overwrites a tensor saved for the backward in
    place once it is used up, even where a view of it, saved too, is still to be read (`donated_buffer` in
    torch/_functorch/config.py, PyTorch 2.13): with `neg.diagonal()` the compiled gradient was wrong. The masks compare
    integers, since inductor cannot generate code for a comparison of two boolean index expressions.
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
    if N == 1:  # no negatives: neg is -inf, and the term 0 with no -inf - -inf on the way, nor g - g in pos's gradient
        return 0 * (pos - pos.detach()), torch.full_like(pos, -torch.inf), pos
    neg = S.masked_fill(i[:, None] == i, -torch.inf).logsumexp(-1)
    negatives = neg if cross else torch.logaddexp(neg[:, a, a][:, :, None], neg)
    term = -F.logsigmoid(pos - negatives)  # softplus, without its threshold
    return term.masked_fill(~paired, 0), neg.masked_fill(~paired, -torch.inf) if cross else neg, pos


def rectangle(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    first: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    negatives: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What `tclr_kernels/general.py` defines: (neg, pos, pos_lse, spread, count), or the sum over the positives.

    rows: sets [G, n, D], none where they are the columns; columns: sets [G, K, D]; first: the rows' place among the
    columns, or -1; negatives: [G, A, C, n] for softplus(negatives - S), summed over the positives: the only output.
    Results have the dtype of the arithmetic, which is that of `gram`.
    """
    wide = torch.promote_types(columns[0].dtype, torch.float32)
    dtype = torch.float64 if columns[0].device.type == "cpu" else wide
    stacked = [torch.stack([x.to(dtype) for x in sets], dim=1) for sets in (rows or columns, columns)]
    r, z = map(unit_rows, stacked) if normalize else stacked
    if isinstance(tau, torch.Tensor):
        tau = tau.to(device=z.device, dtype=dtype)
    (A, n), (C, K) = r.shape[1:3], z.shape[1:3]
    S = (r.flatten(1, 2) @ z.flatten(1, 2).mT / tau).unflatten(2, (C, K)).unflatten(1, (A, n)).transpose(2, 3)

    a, c, i, j = (torch.arange(size, device=z.device) for size in (A, C, n, K))
    there = (a[:, None] // ((A + 1) // 2) != c // ((C + 1) // 2) if cross else a[:, None] == a[:, None])[:, :, None]
    paired = there & (a[:, None] != c)[:, :, None]
    same_index = (i[:, None] + first == j) & (first >= 0)  # [n, K]
    if row_keys is None or column_keys is None:
        left_out, positive = same_index, None
    else:
        same_key = (row_keys[:, :, None] == column_keys[:, None, :]) & (row_keys >= 0)[:, :, None]
        left_out = (same_index | same_key)[:, None, None]
        itself = same_index & (a[:, None] == c)[:, :, None, None]
        positive = same_key[:, None, None] & ~itself & there[..., None]
    if negatives is not None:
        return ((-F.logsigmoid(S - negatives[..., None])).masked_fill(~positive, 0).sum(-1),)
    neg = S.masked_fill(left_out | ~there[..., None], -torch.inf).logsumexp(-1)
    pos = S[:, :, :, i, i + first].masked_fill(~paired, 0) if first >= 0 else torch.zeros_like(neg)
    if positive is None:
        return neg, pos
    pos_lse = S.masked_fill(~positive, -torch.inf).logsumexp(-1)
    count = positive.sum(-1)
    mean = S.masked_fill(~positive, 0).sum(-1) / count.clamp(min=1)
    return neg, pos, pos_lse, (pos_lse - mean).masked_fill(count == 0, 0), count.to(dtype)
