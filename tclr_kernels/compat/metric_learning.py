"""Two losses of pytorch-metric-learning (`from pytorch_metric_learning.losses import NTXentLoss, SupConLoss`).

Both take the arguments of the original:

- `distance`: None, a CosineSimilarity, or a DotProductSimilarity, with p = 2 and power 1;
- `reducer`: None, or one of those in the docstring of the class; `collect_stats`: None or False;
- all are kept as attributes, which may be changed later;
- `forward(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)`: embeddings [N, D], labels [N] of any
  dtype. If ref_emb [K, D] and ref_labels [K] are given, they are the candidates; otherwise each row is compared with
  all other rows. As in the original, if ref_labels is None or the same object as labels, row i of ref_emb is not a
  candidate for row i. The loss is 0 if there is no positive pair, no negative pair, or only one of each, as in an
  empty batch.

Raises ValueError as the original does, and NotImplementedError, naming the argument, for other distances and reducers,
for an embedding_regularizer, and for indices_tuple (a miner's pairs or triplets): the kernels compare rows by their
inner products, and find positives by their labels.

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
        self.temperature: float | Tensor = temperature
        self.distance: Any = distance
        self.reducer: Any = reducer
        self.embedding_regularizer: Any = embedding_regularizer
        self.embedding_reg_weight: float = embedding_reg_weight
        self.collect_stats: bool | None = collect_stats
        self._settings()

    def _settings(self) -> tuple[float | Tensor, bool]:
        """The temperature, and whether rows are normalised. Raises an error for attributes that are not supported."""
        if self.reducer is not None and type(self.reducer).__name__ not in self.REDUCERS:
            shared.unsupported("reducer", self.reducer, f"None or {' or '.join(self.REDUCERS)}")
        if self.embedding_regularizer is not None:
            shared.unsupported("embedding_regularizer", self.embedding_regularizer, "None: add it to the loss")
        if self.collect_stats:
            shared.unsupported("collect_stats", self.collect_stats, "False: there is no matrix to take statistics of")
        return shared.temperature(self.temperature), _normalizes(self.distance)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if indices_tuple is not None:
            shared.unsupported("indices_tuple", type(indices_tuple), "None: all pairs of equal labels are positives")
        if labels is None:
            raise ValueError("labels: found None, wanted a tensor [N]")
        if any(isinstance(x, Tensor) and 0 in x.shape[:1] for x in (embeddings, ref_emb)):
            shared.keys("labels", labels, embeddings)
            return (embeddings * 0).sum()
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
        if ref_emb is None:
            keys = shared.keys("labels", labels, embeddings)
            return shared.rectangle(None, embeddings, *self._settings(), (keys, keys), first=0)
        shared.rows(dict(ref_emb=ref_emb))
        embeddings, ref_emb = checks.sides(embeddings=embeddings, ref_emb=ref_emb)
        same = ref_labels is None or ref_labels is labels
        ref_labels = labels if same else ref_labels
        sides = ("labels", labels, embeddings), ("ref_labels", ref_labels, ref_emb)
        keys = [shared.keys(*side) for side in sides]
        if labels.is_floating_point() != ref_labels.is_floating_point():  # the keys of integers and floats differ
            keys = [shared.keys(name, of_rows.double(), rows) for name, of_rows, rows in sides]
        return shared.rectangle(embeddings, ref_emb, *self._settings(), tuple(keys), first=0 if same else -1)

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        raise NotImplementedError


class NTXentLoss(_Loss):
    """A term for every positive pair, which is compared with the negatives of its anchor.

        l_ip = -log h(z_i, z_p) / ( h(z_i, z_p) + sum_(n not in P(i)) h(z_i, z_n) )

    Arguments: see the docstring of this module; reducer: None or a MeanReducer. Returns the mean over the pairs.
    """

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        neg, *_, count = sums
        return ordered_sum(call.pairs(neg)) / count.sum().clamp(min=1)


class SupConLoss(_Loss):
    """The supervised contrastive loss, with the mean over the positives outside of the logarithm.

        l_i = -1/|P(i)| sum_(p in P(i)) log h(z_i, z_p) / sum_j h(z_i, z_j)

    Arguments: see the docstring of this module; reducer: None or an AvgNonZeroReducer for the mean over the rows whose
    term is above 0, or a MeanReducer for the mean over all rows.
    """

    REDUCERS: tuple[str, ...] = ("AvgNonZeroReducer", "MeanReducer")

    def __init__(self, temperature: float | Tensor = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _reduced(self, call: shared.Rectangle, *sums: Tensor) -> Tensor:
        terms = supervised(*sums)
        of_all = type(self.reducer).__name__ == "MeanReducer"
        return ordered_sum(terms) / (terms.numel() if of_all else (terms > 0).sum().clamp(min=1))


def _normalizes(distance: Any) -> bool:
    """Whether a distance is the cosine; otherwise it is the inner product."""
    if distance is None:
        return True
    plain = getattr(distance, "p", None) == 2 and getattr(distance, "power", None) == 1
    if not plain or type(distance).__name__ not in ("CosineSimilarity", "DotProductSimilarity"):
        shared.unsupported("distance", distance, "None, CosineSimilarity() or DotProductSimilarity()")
    return distance.normalize_embeddings
