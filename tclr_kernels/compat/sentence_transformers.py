"""Multiple negatives ranking (`from sentence_transformers.losses import MultipleNegativesRankingLoss`).

Source: https://github.com/huggingface/sentence-transformers
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import candidates, checks, distributed, general, losses
from ..distributed import Group, Shares
from . import shared

DIRECTIONS = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"
MODES = "joint", "per_direction"
HARDNESS = "in_batch_negatives", "hard_negatives", "all_negatives"
SIMILARITIES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}  # name -> whether it normalises


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of every row of a [N, D] with every row of b [K, D]: [N, K]. The loss only reads its name."""
    return dot_score(nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1))


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of every row of a [N, D] with every row of b [K, D]: [N, K]"""
    return a @ b.T


class MultipleNegativesRankingLoss(nn.Module):
    """Each query is compared with its own document, the documents of the other queries and all hard negatives.

        l_i = -log h(q_i, d_i) / ( sum_j h(q_i, d_j) + sum_m h(q_i, n_m) ),  h(u, v) = exp(scale cos(u, v))

    model: returns {"sentence_embedding": [N, D]} for the features of a column.
    scale: 1 / temperature.
    similarity_fct: cos_sim or dot_score, from sentence-transformers or from this module.
    gather_across_devices: whether every process returns the loss of the rows of all processes.
    directions: which similarities are in the denominator of query i. "query_to_doc", which is required: of the query
    with all documents; "query_to_query": of the query with the other queries; "doc_to_query": of its document with all
    queries; "doc_to_doc": of its document with the documents and hard negatives of the other queries.
    partition_mode: "joint" for one denominator with all directions, "per_direction" for the mean of a loss for each.
    forward(sentence_features, labels=None): the columns are queries, documents, and any number of hard negatives, all
    with the same number of rows.
    Returns the mean over the queries.
    Raises ValueError as sentence-transformers does; NotImplementedError for other similarities, and for a hardness_mode
    with a strength above 0, which gives each negative its own weight.
    Source: https://arxiv.org/abs/1705.00652, section 4.4; https://arxiv.org/abs/2308.03281, equation 2.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[..., Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        shared.temperature(scale, name="scale")
        similarity = getattr(similarity_fct, "__name__", None)
        if similarity not in SIMILARITIES:
            shared.unsupported("similarity_fct", similarity_fct, "cos_sim or dot_score")
        directions = _directions(directions, partition_mode)
        _check_hardness(hardness_mode, hardness_strength)
        self.model: Any = model
        self.scale: float = scale
        self.similarity_fct: Callable[..., Tensor] = similarity_fct
        self.gather_across_devices: bool = gather_across_devices
        self.directions: tuple[str, ...] = directions
        self.partition_mode: str = partition_mode
        self.hardness_mode: str | None = hardness_mode
        self.hardness_strength: float = hardness_strength

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of queries, documents and hard negatives: two or more tensors [N, D]; labels are not used."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: found {len(embeddings)} tensors, wanted at least 2: queries and documents")
        group = "world" if self.gather_across_devices else None
        embeddings = shared.rows({f"embeddings[{k}]": x for k, x in enumerate(embeddings)}, group=group)
        queries, documents, *hard = embeddings
        negatives = torch.cat(hard) if hard else None
        settings = {"normalize": SIMILARITIES[self.similarity_fct.__name__], "group": group}
        scale = shared.temperature(self.scale, name="scale")
        if self.directions == ("query_to_doc",) and hard and group is None:
            loss = _with_hard(queries, torch.cat([documents, *hard]), scale, settings["normalize"])
        elif self.directions == ("query_to_doc",):
            loss = losses.info_nce(queries, documents, logit_scale=scale, negatives=negatives, **settings)
        elif self.partition_mode == "per_direction":
            both = negatives, None
            loss = losses.clip_loss(queries, documents, logit_scale=scale, negatives=both, **settings)
        else:
            loss = _joint(embeddings, scale, self.directions, **settings)
        return shared.as_given(loss, queries)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for a model card."""
        names = "gather_across_devices", "directions", "partition_mode", "hardness_mode", "hardness_strength"
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            **{name: getattr(self, name) for name in names},
        }

    @property
    def temperature(self) -> float:
        return 1 / self.scale


def _with_hard(queries: Tensor, columns: Tensor, scale: float, normalize: bool) -> Tensor:
    """`info_nce` with documents and hard negatives as the columns of one call, since in a small batch calls cost most.

    The label of a query and of its document is the query's index, so the document is its only positive.
    """
    N = len(queries)
    keys = torch.arange(len(columns), device=queries.device)
    return shared.rectangle(queries, columns, 1 / scale, normalize, (keys[:N], keys)).total(False, N)


@distributed.collective
def _joint(
    embeddings: list[Tensor],
    scale: float,
    directions: tuple[str, ...],
    normalize: bool,
    *,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """All directions in one denominator. Row j of every document set belongs to query j."""
    tau = losses._tau(checks.TEMPERATURE, scale, normalize, "mean", embeddings[0], group)
    parts = candidates.contrast(embeddings, tau, normalize, False, None, process=group)
    neg, pos = parts.neg[0], parts.pos[0]  # [V, V, N]: set 0 are the queries, set 1 their documents
    negatives = [*neg[0, 1:], *pos[0, 2:]]
    if "query_to_query" in directions:
        negatives.append(neg[0, 0])
    if "doc_to_query" in directions:
        negatives.append(neg[1, 0])
    if "doc_to_doc" in directions:
        negatives += [*neg[1, 1:]]  # torch.compile adds no tensor to a list
    # the pair is a candidate of the query, and again of the document: log(m e^p + e^n) - p
    times = math.log(2) if "doc_to_query" in directions else 0.0
    terms = general.cost(negatives, pos[0, 1] + times) + times
    return losses._reduce(terms, "mean", losses._rows(embeddings[0], group), group)


def _directions(directions: Sequence[str], partition_mode: str) -> tuple[str, ...]:
    """The directions, each once."""
    found = tuple(dict.fromkeys(directions or ()))
    if "query_to_doc" not in found or not set(found) <= set(DIRECTIONS):
        raise ValueError(f"directions: found {directions!r}, wanted 'query_to_doc' and others of {DIRECTIONS}")
    checks.one_of("partition_mode", partition_mode, MODES)
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(found):
        raise ValueError(
            f"partition_mode: found 'per_direction' beside the directions {directions!r}, wanted 'joint': "
            "'query_to_query' and 'doc_to_doc' have no positive"
        )
    return found


def _check_hardness(mode: str | None, strength: float) -> None:
    if mode is not None:
        checks.one_of("hardness_mode", mode, HARDNESS)
    if not isinstance(strength, numbers.Real) or not strength >= 0:
        raise ValueError(f"hardness_strength: found {strength!r}, wanted a number >= 0")
    if mode is not None and strength > 0:
        shared.unsupported("hardness_mode", mode, "None: the kernels give all negatives the same weight")
