"""The loss of SupContrast (`from losses import SupConLoss`), the code of the authors of the SupCon paper.

Source: https://github.com/HobbitLong/SupContrast
"""

import torch
from torch import Tensor, nn

from .. import checks, general, losses
from ..symmetric import ordered_sum
from . import shared

MODES = "all", "one"


class SupConLoss(nn.Module):
    """The supervised contrastive loss, with the mean over the positives outside of the logarithm.

        l_i = -(tau / base_tau) / |P(i)| sum_(p in P(i)) log h(z_i, z_p) / sum_(j != i) h(z_i, z_j)

    with h(u, v) = exp(<u, v> / tau): rows are not normalised here.
    contrast_mode: "all" if the rows of all views are anchors, "one" if only those of the first view are.
    forward(features, labels=None, mask=None): features [B, V, ...], whose dimensions after V are flattened; labels [B]
    of any dtype, or mask [B, B], where mask_ij is the weight of sample j, in each view, as a positive of sample i. The
    mask need not be symmetric. Without either, the positives are the other views of a sample: SimCLR's loss.
    Returns the mean over the anchors, where those without positives count as 0, in float32 or float64. An anchor whose
    weights add up to less than 1e-6 has their weighted sum, not their mean.
    Raises ValueError as SupContrast does; for an unknown contrast_mode, already at construction.
    Source: https://arxiv.org/abs/2004.11362, equation 2.
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        shared.temperature(temperature)
        shared.temperature(base_temperature, name="base_temperature")
        checks.one_of("contrast_mode", contrast_mode, MODES)
        self.temperature: float | Tensor = temperature
        self.contrast_mode: str = contrast_mode
        self.base_temperature: float = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if labels is not None and mask is not None:
            raise ValueError("labels, mask: found both, wanted one of them or neither")
        if isinstance(features, Tensor) and features.dim() > 3:
            features = features.flatten(2)
        (views,) = checks.embeddings("B V D", features=features)
        B, V, D = views.shape
        rows = views.transpose(0, 1).reshape(V * B, D)
        anchors = B if self.contrast_mode == "one" else V * B
        tau = shared.temperature(self.temperature)
        count = anchors * shared.temperature(self.base_temperature, name="base_temperature") / tau
        if mask is None:
            loss = _against_all(rows, anchors, tau, torch.cat([_labels(labels, rows[:B])] * V)).total(True, count)
        else:
            with torch.autocast(checks.autocast_type(rows.device), enabled=False):
                loss = ordered_sum(_of_mask(rows, anchors, tau, _mask(mask, B, rows))) / count
        return losses._rounded(loss, rows)


def _against_all(
    rows: Tensor, anchors: int, tau: float | Tensor, keys: Tensor | None = None, half: bool = False
) -> shared.Rectangle:
    """The first rows against all."""
    some = None if anchors == len(rows) else rows[:anchors]
    both = general.NO_KEYS if keys is None else (keys[:anchors], keys)
    return shared.rectangle(some, rows, tau, False, both, first=0, half=half)


def _of_mask(rows: Tensor, anchors: int, tau: float | Tensor, mask: Tensor) -> Tensor:
    """The mean of the positives' similarities is the similarity to their mean, which needs no matrix of rows."""
    B, half, rows = len(mask), rows.element_size() == 2, general.at_least_float32(rows)
    (neg,) = _against_all(rows, anchors, tau, half=half).sums()
    of_all_views = mask @ rows.unflatten(0, (-1, B)).sum(0)
    itself = mask.diagonal()[:, None]
    count = (mask.sum(1, keepdim=True) * (len(rows) // B) - itself).T
    anchor = rows[:anchors].unflatten(0, (-1, B))  # [anchors / B, B, D]
    positive = (anchor * (of_all_views - itself * anchor)).sum(2) / tau
    divisor = count.where(~(count < 1e-6), 1)
    weight = count / divisor
    return weight * neg.view_as(positive).where(weight != 0, 0) - positive / divisor


def _labels(labels: Tensor | None, samples: Tensor) -> Tensor:
    """The keys of samples [B, D]: [B]"""
    if labels is None:
        return torch.arange(len(samples), device=samples.device)
    return shared.keys("labels", labels.reshape(-1) if isinstance(labels, Tensor) else labels, samples)


def _mask(mask: Tensor, B: int, rows: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: found a {type(mask).__name__}, wanted a tensor [{B}, {B}]")
    if mask.shape != (B, B):
        raise ValueError(f"mask: found shape {list(mask.shape)}, wanted [{B}, {B}]")
    return mask.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
