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
