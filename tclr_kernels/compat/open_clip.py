"""The contrastive loss of open_clip (`from open_clip.loss import ClipLoss`).

Source: https://github.com/mlfoundations/open_clip
"""

import numbers
import warnings

import torch
from torch import Tensor, nn

from .. import checks, distributed, losses
from ..distributed import Group, Shares
from . import shared


class ClipLoss(nn.Module):
    """The loss of CLIP, as `clip_loss` with `normalize=False`.

        l_i = -log exp(s <a_i, b_i>) / sum_j exp(s <a_i, b_j>),  likewise for b_i and all a_j

    world_size: the number of processes. Each returns the loss of the rows of all, and the gradients, averaged over the
    processes, are those of a single process, for all values of `local_loss` and `gather_with_grad`. (open_clip's are
    not without `gather_with_grad`; a warning at construction says so.) `rank` is ignored: torch.distributed knows it.
    `cache_labels` is ignored too, since there are no labels to cache.
    forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False): features [N, D];
    logit_scale: a number > 0 or a tensor of one element, not its logarithm; logit_bias: the same number is added to
    every logit, which changes neither the loss nor a gradient, so its own gradient is 0. Returns the mean over the 2 N
    rows, as {"contrastive_loss": mean} if output_dict.
    Raises NotImplementedError for use_horovod, and ValueError if world_size is not that of torch.distributed.
    Source: https://arxiv.org/abs/2103.00020, figure 3.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            shared.unsupported("use_horovod", use_horovod, "False: the processes must be torch.distributed's")
        if world_size > 1 and not gather_with_grad:
            warnings.warn(
                "gather_with_grad=False is ignored: the gradient is complete, while open_clip's lacks the part that "
                "comes from the rows of other processes. A learning rate tuned with open_clip may be too high.",
                stacklevel=2,
            )
        self.local_loss: bool = local_loss
        self.gather_with_grad: bool = gather_with_grad
        self.cache_labels: bool = cache_labels
        self.rank: int = rank
        self.world_size: int = world_size
        self.use_horovod: bool = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        group = self._group()
        image, text, logit_scale = _checked(image_features, text_features, logit_scale, logit_bias, group=group)
        if group is None and isinstance(logit_scale, Tensor) and image.dtype in (torch.float32, torch.float64):
            # for a small batch, this product takes less time than to pass the scale to the kernels as a tensor
            image, logit_scale = image * logit_scale.to(image.dtype), 1.0
        loss = losses.clip_loss(image, text, logit_scale=logit_scale, normalize=False, group=group)
        if isinstance(logit_bias, Tensor):  # a parameter that gets no gradient stops DistributedDataParallel
            loss = loss + 0 * logit_bias.sum()
        loss = shared.as_given(loss, image)
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self) -> str | None:
        if self.world_size == 1:
            return None
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        found = torch.distributed.get_world_size() if there else 1
        if found != self.world_size:
            raise ValueError(f"world_size: found {self.world_size}, wanted {found}, the processes of torch.distributed")
        return "world"


@distributed.collective
def _checked(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    group: Group = None,
    shares: Shares = None,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The features and the scale."""
    features = dict(image_features=image_features, text_features=text_features)
    image, text = checks.embeddings("N D", group is not None, **features)
    of_tensor = isinstance(logit_bias, Tensor)
    if not (logit_bias.numel() == 1 if of_tensor else logit_bias is None or isinstance(logit_bias, numbers.Real)):
        found = f"a tensor of shape {list(logit_bias.shape)}" if of_tensor else repr(logit_bias)
        raise ValueError(f"logit_bias: found {found}, wanted None, a number or a tensor of one element")
    return image, text, shared.temperature(logit_scale, name="logit_scale")
