"""Two losses of pytorch-metric-learning (`from pytorch_metric_learning.losses import NTXentLoss, SupConLoss`).

Both take the arguments of the original:

- `distance`: None, a CosineSimilarity, or a DotProductSimilarity, with p = 2 and power 1;
- `reducer`: None, or one that does what the loss does anyway; `collect_stats`: None or False;
- `forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`: embeddings [N, D], labels [N] of any
  dtype. With ref_emb [K, D] and ref_labels [K], these are the candidates. Row i is no candidate of itself; as in the
  original, row i of ref_emb is none of row i where ref_labels is the same object as labels, or None. The loss is 0
  without a positive or without a negative pair, and where there is one of each at most.

ValueError as in the original. NotImplementedError, naming the argument, for other distances and reducers, for an
embedding_regularizer, and for indices_tuple, a miner's pairs or triplets: the operation compares rows by their inner
products, and tells positives by labels.

Source: https://github.com/KevinMusgrave/pytorch-metric-learning
"""

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..labelled import supervised
from ..symmetric import ordered_sum
from . import shared


class _Loss(nn.Module):
    """What the two losses have in common."""

    REDUCERS: tuple[str, ...] = ("MeanReducer",)

    def __init__(
        self,
        temperature: float | Tensor,
        distance: Any = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__()
        shared.temperature(temperature)
        if reducer is not None and type(reducer).__name__ not in self.REDUCERS:
            shared.no_place("reducer", reducer, f"None or {' or '.join(self.REDUCERS)}")
        if embedding_regularizer is not None:
            shared.no_place("embedding_regularizer", embedding_regularizer, "None: add it to the loss")
        if collect_stats:
            shared.no_place("collect_stats", collect_stats, "False: there is no matrix to take statistics of")
        self.temperature: float | Tensor = temperature
        self.normalize: bool = _normalizes(distance)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if indices_tuple is not None:
            shared.no_place("indices_tuple", type(indices_tuple), "None: all pairs of equal labels are positives")
        if labels is None:
            raise ValueError("labels: found None, wanted a tensor [N]")
        call = self._call(embeddings, labels, ref_emb, ref_labels)
        neg, *positives = call.sums()
        loss = self._reduced(call, neg, *positives)
        n, K = neg.numel(), call.columns[0].shape[1]
        positive = positives[-1].sum()
        negative = n * K - (n if call.settings.first == 0 else 0) - positive
        some = (positive > 0) & (negative > 0) & ((positive > 1) | (negative > 1))
        return shared.as_given(loss.where(some, 0), embeddings)

    def _call(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None
    ) -> shared.Rectangle:
        (embeddings,) = shared.rows(dict(embeddings=embeddings))
        keys = shared.keys("labels", labels, embeddings)
        if ref_emb is None:
            return shared.rectangle(None, embeddings, self.temperature, self.normalize, (keys, keys), first=0)
        shared.rows(dict(ref_emb=ref_emb))
        embeddings, ref_emb = checks.sides(embeddings=embeddings, ref_emb=ref_emb)
        same = ref_labels is None or ref_labels is labels
        both = keys, shared.keys("ref_labels", labels if same else ref_labels, ref_emb)
        return shared.rectangle(embeddings, ref_emb, self.temperature, self.normalize, both, first=0 if same else -1)

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        raise NotImplementedError


class NTXentLoss(_Loss):
    """A term for every positive pair, each against the negatives of its anchor.

        l_ip = -log h(z_i, z_p) / ( h(z_i, z_p) + sum_(n not in P(i)) h(z_i, z_n) )

    Arguments: in the head of this module. Returns the mean over the pairs.
    """

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        neg, *_, count = sums
        return ordered_sum(call.pairs(neg)) / count.sum().clamp(min=1)


class SupConLoss(_Loss):
    """Supervised contrast, the logarithm outside of the mean over the positives.

        l_i = -1/|P(i)| sum_(p in P(i)) log h(z_i, z_p) / sum_j h(z_i, z_j)

    Arguments: in the head of this module. Returns the mean over the rows whose term is above 0, as the original's
    AvgNonZeroReducer does, or over all rows with a MeanReducer.
    """

    REDUCERS: tuple[str, ...] = ("AvgNonZeroReducer", "MeanReducer")

    def __init__(self, temperature: float | Tensor = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)
        self.nonzero: bool = type(kwargs.get("reducer")).__name__ != "MeanReducer"

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        terms = supervised(*sums)
        return ordered_sum(terms) / ((terms > 0).sum().clamp(min=1) if self.nonzero else terms.numel())


def _normalizes(distance: Any) -> bool:
    """Whether a distance is the cosine; otherwise it is the inner product."""
    if distance is None:
        return True
    plain = getattr(distance, "p", None) == 2 and getattr(distance, "power", None) == 1
    if not plain or type(distance).__name__ not in ("CosineSimilarity", "DotProductSimilarity"):
        shared.no_place("distance", distance, "None, CosineSimilarity() or DotProductSimilarity()")
    return distance.normalize_embeddings
