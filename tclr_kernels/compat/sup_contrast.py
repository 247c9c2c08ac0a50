"""The loss of SupContrast (`from losses import SupConLoss`), the code of the authors of the SupCon paper.

Source: https://github.com/HobbitLong/SupContrast
"""

import torch
from torch import Tensor, nn

from .. import checks, general
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
    Returns the mean over the anchors, where those without positives count as 0.
    Raises ValueError as SupContrast does; for an unknown contrast_mode, already at construction.
    Source: https://arxiv.org/abs/2004.11362, equation 2.
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07
    ) -> None:
        super().__init__()
        shared.temperature(temperature)
        checks.one_of("contrast_mode", contrast_mode, MODES)
        self.temperature: float | Tensor = temperature
        self.contrast_mode: str = contrast_mode
        self.base_temperature: float = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if features.dim() < 3:
            raise ValueError(f"features: found shape {list(features.shape)}, wanted [B, V, ...]")
        if labels is not None and mask is not None:
            raise ValueError("labels, mask: found both, wanted one of them or neither")
        views = features.flatten(2)
        B, V, _ = views.shape
        rows = views.transpose(0, 1).reshape(V * B, -1)
        (rows,) = shared.rows(dict(features=rows))
        anchors = B if self.contrast_mode == "one" else V * B
        count = anchors * self.base_temperature / self.temperature
        if mask is None:
            loss = self._against_all(rows, anchors, torch.cat([_labels(labels, rows[:B])] * V)).total(True, count)
        else:
            with torch.autocast(checks.autocast_type(rows.device), enabled=False):
                loss = ordered_sum(self._of_mask(general.at_least_float32(rows), anchors, _mask(mask, B, rows))) / count
        return shared.as_given(loss, features)

    def _against_all(self, rows: Tensor, anchors: int, keys: Tensor | None = None) -> shared.Rectangle:
        """The first rows against all."""
        some = None if anchors == len(rows) else rows[:anchors]
        both = general.NO_KEYS if keys is None else (keys[:anchors], keys)
        return shared.rectangle(some, rows, self.temperature, False, both, first=0)

    def _of_mask(self, rows: Tensor, anchors: int, mask: Tensor) -> Tensor:
        """The mean of the positives' similarities is the similarity to their mean, which needs no matrix of rows."""
        B = len(mask)
        (neg,) = self._against_all(rows, anchors).sums()
        of_all_views = mask @ rows.unflatten(0, (-1, B)).sum(0)
        itself = mask.diagonal()[:, None]
        count = mask.sum(1, keepdim=True) * (len(rows) // B) - itself
        anchor = rows[:anchors].unflatten(0, (-1, B))  # [anchors / B, B, D]
        positive = (anchor * (of_all_views - itself * anchor)).sum(2) / self.temperature
        some = (count >= 1e-6).T
        mean = positive / count.T.where(some, 1)
        return (neg.view_as(mean) - mean).where(some, 0)


def _labels(labels: Tensor | None, samples: Tensor) -> Tensor:
    """The keys of samples [B, D]: [B]"""
    if labels is None:
        return torch.arange(len(samples), device=samples.device)
    return shared.keys("labels", labels.reshape(-1), samples)


def _mask(mask: Tensor, B: int, rows: Tensor) -> Tensor:
    if mask.shape != (B, B):
        raise ValueError(f"mask: found shape {list(mask.shape)}, wanted [{B}, {B}]")
    return mask.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
