"""The contrastive losses of lightly 1.6 (`from lightly.loss import ...`) and the SupConLoss of its repository.

With `gather_distributed=True` every process returns the loss of the rows of all processes; lightly returns the loss of
the process's own rows. The gradients, averaged over the processes, are the same. A negative temperature raises a
ValueError; lightly accepts it.

Source: https://github.com/lightly-ai/lightly
"""

import functools
import numbers
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import candidates, checks, distributed, general, losses
from ..distributed import Group, Shares
from . import shared

Weights = Callable[[Tensor, Tensor], Tensor]
SMALLEST = 1e-8  # the smallest temperature that lightly accepts, in the losses that check it


class _Loss(nn.Module):
    temperature: float | Tensor
    gather_distributed: bool

    def __init__(self, temperature: float | Tensor, gather_distributed: bool, smallest: float = 0.0) -> None:
        super().__init__()
        shared.temperature(temperature, smallest)
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed: found True, wanted False: this PyTorch has no torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    @property
    def _tau(self) -> float | Tensor:
        return shared.temperature(self.temperature)

    @property
    def _group(self) -> str | None:
        return "world" if self.gather_distributed else None


class NTXentLoss(_Loss):
    """NT-Xent of two views, as `nt_xent`; with a memory bank MoCo's loss, as `info_nce` with a queue.

        l_i = -log h(a_i, b_i) / sum_j [ 1[j != i] h(a_i, a_j) + h(a_i, b_j) ],  likewise for b_i
        l_i = -log h(a_i, b_i) / ( h(a_i, b_i) + sum_m h(a_i, bank_m) )          with a memory bank

    memory_bank_size: 0, or (rows, D). Each call whose first view gets a gradient stores its second view in the bank; as
    in lightly, if a batch reaches past the end of the bank, the rest of it is dropped. With gather_distributed
    the rows of all processes are stored, but the loss is still that of the process's own rows.
    forward(out0, out1): [N, D] each. Returns the mean over the rows. Raises ValueError as lightly does.
    Source: SimCLR, https://arxiv.org/abs/2002.05709; MoCo, https://arxiv.org/abs/1911.05722.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, SMALLEST)
        self.memory_bank: MemoryBank = MemoryBank(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        out0, out1 = shared.rows(dict(out0=out0, out1=out1), group=self._group)
        if not self.memory_bank.size[0]:
            return shared.as_given(losses.nt_xent(out0, out1, self._tau, group=self._group), out0)
        shared.width("memory_bank", self.memory_bank.bank, out0)
        bank = self.memory_bank.bank.to(out0.device, out0.dtype, copy=True)  # the module may have stayed on the CPU
        loss = losses.info_nce(out0, out1, self._tau, negatives=bank, in_batch=False)
        if out0.requires_grad and torch.is_grad_enabled():
            self.memory_bank.enqueue(shared.everybody(F.normalize(out1.detach(), dim=1), group=self._group))
        return shared.as_given(loss, out0)


class MemoryBank(nn.Module):
    """The rows of earlier batches, stored in the same order as by lightly's MemoryBankModule. bank: [rows, D]

    size: 0 for no bank, or (rows, D). Raises ValueError for anything else.
    """

    bank: Tensor
    bank_ptr: Tensor  # where the next rows go, on the device: reading it here would wait for the device

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size: tuple[int, ...] = tuple(size) if isinstance(size, Iterable) else (size,)
        integers = all(isinstance(x, numbers.Integral) and not isinstance(x, bool) and x >= 0 for x in self.size)
        if not integers or (self.size != (0,) and len(self.size) != 2):
            raise ValueError(f"memory_bank_size: found {size!r}, wanted 0 or a pair (rows, D) of integers >= 0")
        self.register_buffer("bank", F.normalize(torch.randn(self.size), dim=-1), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Replaces the oldest rows by these [n, D]. Those that would go past the end of the bank are dropped."""
        size, n, rows = len(self.bank), len(rows), rows.to(self.bank)
        room = size - self.bank_ptr
        kept = torch.minimum(torch.arange(n, device=rows.device), room - 1)  # rows beyond the end repeat the last one
        self.bank.index_copy_(0, self.bank_ptr + kept, rows[kept])
        self.bank_ptr.copy_((self.bank_ptr + n).where(n < room, 0))


class DCLLoss(_Loss):
    """Decoupled contrastive loss: NT-Xent whose denominator leaves the positive out.

        l_i = -w_i S(a_i, b_i) + log sum_(j != i) [ exp S(a_i, a_j) + exp S(a_i, b_j) ],  likewise for b_i

    S is the cosine divided by the temperature. This is the paper's loss, and lightly's since 1.5.21. Before, lightly
    added two logarithms, log sum exp S(a_i, a_j) + log sum exp S(a_i, b_j), as `two_logarithms=True` does: the
    negatives of each view then have the same total weight in the gradient, and the value is about twice as large.

    weight_fn: a function of two normalised views [N, D] that returns the weights w of the positives, [N] or one number;
    it is called for (out0, out1) and for (out1, out0), always with the process's own rows.
    forward(out0, out1): [N, D] each. Returns the mean over the rows; -inf without negatives, as lightly does.
    Source: https://arxiv.org/abs/2110.06848, equation 6.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        weight_fn: Weights | None = None,
        gather_distributed: bool = False,
        *,
        two_logarithms: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed)
        checks.flag("two_logarithms", two_logarithms)
        if weight_fn is not None and not callable(weight_fn):
            raise TypeError(f"weight_fn: found {weight_fn!r}, wanted None or a function of two views")
        self.weight_fn: Weights | None = weight_fn
        self.two_logarithms: bool = two_logarithms

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        out0, out1 = shared.rows(dict(out0=out0, out1=out1), group=self._group)
        weights = None
        if self.weight_fn:
            a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
            weights = [self.weight_fn(a, b), self.weight_fn(b, a)]
        loss = _decoupled(out0, out1, self._tau, weights, self.two_logarithms, group=self._group)
        return shared.as_given(loss, out0)


@distributed.collective
def _decoupled(
    out0: Tensor,
    out1: Tensor,
    temperature: float | Tensor,
    weights: list[float | Tensor] | None,
    two_logarithms: bool,
    *,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """weights: of the positives with the rows of each view as anchors"""
    if weights is not None:
        weights = torch.stack([_weights(x, out0) for x in weights])
    tau = losses._tau(temperature, None, True, "mean", out0, group)
    parts = candidates.contrast([out0, out1], tau, True, False, None, process=group)
    neg, pos = (losses._own(x, group)[0] for x in (parts.neg, parts.pos))  # [2, 2, N]
    negatives = neg.sum(1) if two_logarithms else general.log_add(neg[:, 0], neg[:, 1])
    positives = pos.sum(1)  # where a view meets itself, pos is 0
    terms = negatives - (positives if weights is None else positives * weights)
    return losses._reduce(terms, "mean", 2 * losses._rows(out0, group), group, parts=True)


def _weights(weights: float | Tensor, rows: Tensor) -> Tensor:
    """What a weight_fn returned for rows [N, D]: [N]"""
    if isinstance(weights, numbers.Real):
        weights = rows.new_tensor(weights)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weight_fn: returned {weights!r}, wanted a tensor of shape [{len(rows)}]")
    if weights.numel() != 1 and weights.shape != rows.shape[:1]:
        raise ValueError(f"weight_fn: returned shape {list(weights.shape)}, wanted [{len(rows)}], one for each row")
    return weights.reshape(-1).expand(len(rows))


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """The weights of DCLW: 2 - N softmax_i(<a_i, b_i> / sigma), without a gradient.

    out0, out1: [N, D], normalised. Returns [N].
    Source: https://arxiv.org/abs/2110.06848, section 3.3.
    """
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLWLoss(DCLLoss):
    """`DCLLoss` whose positives have the weights `negative_mises_fisher_weights` with sigma."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        two_logarithms: bool = False,
    ) -> None:
        weights = functools.partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weights, gather_distributed, two_logarithms=two_logarithms)


class SupConLoss(_Loss):
    """Supervised contrast of two views, as `sup_con`, times the temperature if `rescale`.

        l_i = -1/|P(i)| sum_(p in P(i)) log h(z_i, z_p) / sum_(j != i) h(z_i, z_j)

    forward(out0, out1, labels=None): [N, D] each; labels [N] of any dtype. Without labels it is NT-Xent. With
    gather_distributed, labels are gathered too (lightly raises an error there). Returns the mean over the rows, in
    float32 or float64.
    Source: https://arxiv.org/abs/2004.11362, equation 2.
    """

    def __init__(
        self, temperature: float | Tensor = 0.5, gather_distributed: bool = False, rescale: bool = True
    ) -> None:
        super().__init__(temperature, gather_distributed, SMALLEST)
        self.rescale: bool = rescale

    def forward(self, out0: Tensor, out1: Tensor, labels: Tensor | None = None) -> Tensor:
        out0, out1 = shared.rows(dict(out0=out0, out1=out1), group=self._group)
        if labels is None:
            loss = losses.nt_xent(out0, out1, self._tau, group=self._group)
        else:
            keys = shared.keys("labels", labels, out0, group=self._group)
            loss = losses.sup_con(torch.cat([out0, out1]), keys.repeat(2), self._tau, group=self._group)
        return losses._rounded(loss * self._tau if self.rescale else loss, out0)
