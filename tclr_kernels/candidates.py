"""Losses with labels or with further negatives, composed of calls of `general.py`.

Results have the dtype of `general.py`, and losses round them at the end. If several calls use the same inputs, these
are converted to float32 first, because autograd adds the gradients of the calls: in float16, those of a row of small
norm can be inf and -inf, and their sum NaN. With `half`, the backend learns that products of half precision are enough.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, distributed, general
from .distributed import Further, Process
from .queue import NegativeQueue
from .symmetric import traced, widened

Negatives = Tensor | NegativeQueue


def checked_negatives(
    name: str, negatives: Negatives | None, anchors: Tensor, process: Process | None = None
) -> Further | None:
    """Checks the further negatives, [K, D] or [..., K, D], of anchors [..., N, D]. Of a queue, copies the rows."""
    if negatives is None:
        return None
    queue = isinstance(negatives, NegativeQueue)
    if not queue and not isinstance(negatives, Tensor):
        found = f"a {type(negatives).__name__}"
        raise TypeError(f"{name}: found {found}, wanted a torch.Tensor [K, D] or [..., K, D], or a NegativeQueue")
    rows = negatives.rows.to(anchors.dtype, copy=torch.is_grad_enabled()) if queue else negatives
    return Further(checks.sides(process is not None, embeddings=anchors, **{name: rows})[1], everywhere=queue)


class Contrast(NamedTuple):
    """Log-sum-exps for the anchors of sets [G, N, D], in the dtype of `general.rectangle`.

    neg, pos: [G, V, V, N], as in `symmetric.py`, but neg leaves out the anchor's own label.
    further: the log-sum-exp of the further negatives, [G, V, N], or None. If only the first set has any, it may be
    [G, 1, N].
    """

    neg: Tensor
    pos: Tensor
    further: Tensor | None

    def terms(self, cross: bool, decoupled: bool, one_sided: bool = False) -> Tensor:
        """The terms of each row against each other set, as `general.terms` returns them."""
        return general.terms(self.neg, self.pos, cross, self.further, decoupled, one_sided)

    def joint_terms(self, decoupled: bool) -> Tensor:
        """The terms of each row against all sets together, with its positives added up: [G, V, N]"""
        sets = torch.arange(self.pos.shape[1], device=self.pos.device)
        itself = (sets[:, None] == sets)[:, :, None]
        positive = self.pos.masked_fill(itself, -torch.inf).logsumexp(2)
        blocks = [*self.neg.unbind(2), *([] if self.further is None else [self.further])]
        return general.cost(blocks, positive, decoupled)


def contrast(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    backend: str | None,
    labels: Tensor | None = None,
    negatives: Sequence[Further | None] | None = None,
    process: Process | None = None,
    one_sided: bool = False,
    half: bool | None = None,
) -> Contrast:
    """Compares sets [..., N, D] with each other and with further negatives.

    labels: integers [N] or [..., N].
    negatives: a list of one, for all anchors, or of one (or None) for each set.
    process: this process's part in a group. The results are then those of the anchors of all processes.
    one_sided: whether only the first of two sets has anchors. Then only its negatives count.
    half: whether products of half precision are accurate enough if inputs must be converted; None: if the sets have it.
    """
    *_, N, D = sets[0].shape
    keys = None if labels is None else checks.keys("labels", labels, sets[0])
    if process is not None:
        (neg, pos, *_), further = _of_all(process, sets, tau, normalize, cross, backend, keys, negatives, half)
        return Contrast(neg, pos, further)
    keys = None if keys is None else keys.reshape(-1, N)
    half = sets[0].element_size() == 2 if half is None else half
    if negatives is not None:
        tau, sets = general.at_least_float32(tau), widened(backends.choose(backend, sets[0].device), *sets)
    sets = [z.reshape(-1, N, D) for z in sets]
    neg, pos, *_ = all_pairs(sets, tau, normalize, cross, backend, keys, half=half)
    if negatives is None:
        return Contrast(neg, pos, None)
    call = functools.partial(log_sum, tau=tau, normalize=normalize, backend=backend, half=half)
    if len(negatives) == 1:
        rows = torch.stack(sets, 1)
        return Contrast(neg, pos, call(rows, negatives[0].rows))
    if one_sided:
        return Contrast(neg, pos, call(sets[0], negatives[0].rows)[:, None])
    parts = [
        neg.new_full((len(neg), N), -torch.inf) if x is None else call(z, x.rows)
        for z, x in zip(sets, negatives, strict=True)
    ]
    return Contrast(neg, pos, torch.stack(parts, 1))


def all_pairs(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    backend: str | None,
    keys: Tensor | None = None,
    process: Process | None = None,
    half: bool = False,
) -> tuple[Tensor, ...]:
    """The outputs of `general.rectangle` for all rows of sets [G, N, D] against each other.

    keys: labels [G, N]. half: whether the sets were of half precision.
    """
    if process is not None:
        return _of_all(process, sets, tau, normalize, cross, backend, keys)[0]
    G, N, D = sets[0].shape
    name = backends.choose(backend, sets[0].device, G * len(sets) * N, D, sets[0].dtype)
    of_rows = keys if keys is None else keys.view(G, N)  # torch.compile refuses the same tensor as two inputs
    return general.rectangle(general.Settings(name, normalize, cross, 0, half), tau, (of_rows, keys), [], sets)


def _of_all(
    process: Process,
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    backend: str | None,
    keys: Tensor | None = None,
    negatives: Sequence[Further | None] | None = None,
    half: bool | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs for all anchors of all processes, and the log-sum-exp of their further negatives."""
    *leading, n, D = sets[0].shape
    G = math.prod(leading)
    backends.choose(backend, sets[0].device)  # raises its errors now, while the other processes can still be told
    process.agree(sets[0], len(sets), negatives or ())
    name = backends.choose(backend, sets[0].device, G * len(sets) * process.rows, D, sets[0].dtype)
    half = process.dtype.itemsize == 2 if half is None else half
    settings = general.Settings(name, normalize, cross, half=half)
    sets = [z.reshape(G, n, D) for z in sets]
    keys = None if keys is None else keys.reshape(G, n)
    return distributed.contrast(process, settings, tau, keys, sets, negatives)


def log_sum(
    anchors: Tensor, negatives: Tensor, tau: float | Tensor, normalize: bool, backend: str | None, half: bool
) -> Tensor:
    """The log-sum-exp of anchors [G, ..., D] against negatives, [K, D] or [..., K, D] for each group: [G, ...]"""
    groups, D = 1 if negatives.dim() == 2 else len(anchors), anchors.shape[-1]
    rows, columns = (z.to(anchors.dtype).reshape(groups, -1, D) for z in (anchors, negatives))
    size = rows.shape[:-1].numel() + columns.shape[:-1].numel()
    name = backends.choose(backend, rows.device, size, D, rows.dtype)
    settings = general.Settings(name, normalize, half=half)
    neg, *_ = general.rectangle(settings, tau, general.NO_KEYS, [rows], [columns])
    return neg.reshape(anchors.shape[:-1])


def partners(
    a: Tensor,
    b: Tensor,
    negatives: Further,
    tau: float | Tensor,
    normalize: bool,
    backend: str | None,
    process: Process | None = None,
    half: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """For rows a [..., N, D] whose only candidates are their partners in b and further negatives, as in MoCo.

    half: as for `contrast`.
    Returns the log-sum-exp of the negatives and the similarities of the partners, both [..., N].
    """
    if process is not None:
        backends.choose(backend, a.device)  # raises its errors now, as above
        process.agree(a, 2, [negatives])
    half, tau = a.element_size() == 2 if half is None else half, general.at_least_float32(tau)
    a, b = widened(backends.choose(backend, a.device), a, b)
    in_pairs = [z.reshape(a.shape[:-1].numel(), 1, z.shape[-1]) for z in (a, b)]
    _, pos, *_ = all_pairs(in_pairs, tau, normalize, True, backend, half=half)
    pos, rows = general.first_with_second(pos).reshape(a.shape[:-1]), a.reshape(a.shape[:-2].numel(), *a.shape[-2:])
    if process is None:
        return log_sum(rows, negatives.rows, tau, normalize, backend, half).reshape(a.shape[:-1]), pos
    name = backends.choose(backend, a.device, process.rows, a.shape[-1], a.dtype)
    settings = general.Settings(name, normalize, half=half)
    columns = distributed.gathered(process, [rows])
    neg = distributed.further_log_sum(process, settings, tau, [rows], columns, [negatives])
    return neg.reshape(*a.shape[:-2], -1), traced(distributed.Everybody, process, pos)
