"""The model of MoCo v1 and v2 (`from moco.builder import MoCo`), and its loss alone, for your own encoders.

Source: https://github.com/facebookresearch/moco
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import candidates, checks, losses
from ..distributed import Further
from . import shared


class MoCoLoss(nn.Module):
    """MoCo's loss and its queue, without the encoders.

        l_i = -log exp(<q_i, k_i> / T) / ( exp(<q_i, k_i> / T) + sum_m exp(<q_i, queue_m> / T) )

    dim: the size of an embedding; K: the number of keys in the queue; T: the temperature. The buffers `queue` [dim, K]
    and `queue_ptr` [1] have MoCo's names and shapes, so its checkpoints load. With the same seed, the queue starts with
    the same values as MoCo's.
    forward(q, k): [N, dim] each, rows of length one. Returns the mean over the rows of this process, and puts the keys
    of all processes into the queue.
    Raises ValueError if K is not a multiple of the number of keys; MoCo raises an AssertionError.
    Source: https://arxiv.org/abs/1911.05722, equation 1 and algorithm 1.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, K: int = 65536, T: float = 0.07) -> None:
        super().__init__()
        checks.size("dim", dim)
        checks.size("K", K)
        shared.temperature(T, name="T")
        self.K: int = K
        self.T: float = T
        rows = F.normalize(torch.randn(dim, K), dim=0).T.contiguous()  # every key is contiguous in memory
        self.register_buffer("queue", rows.T)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = shared.rows(dict(q=q, k=k), group="world")
        loss = losses.info_nce(q, k, self._tau, normalize=False, negatives=self._negatives(q), in_batch=False)
        self._dequeue_and_enqueue(k)
        return shared.as_given(loss, q)

    @property
    def _tau(self) -> float | Tensor:
        return shared.temperature(self.T, name="T")

    def _negatives(self, q: Tensor) -> Tensor:
        """A copy, since new keys take the place of some rows before the backward: [K, dim]"""
        shared.width("queue", self.queue.T, q)
        return self.queue.T.to(q.dtype, copy=True)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        keys = shared.everybody(keys, group="world")
        n = len(keys)
        if not n or self.K % n:
            raise ValueError(
                f"K: found {self.K}, wanted a multiple of the number of keys, {n} on all processes together"
            )
        places = (self.queue_ptr + torch.arange(n, device=keys.device)) % self.K
        self.queue.T.index_copy_(0, places, keys.to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + n) % self.K)


class MoCo(MoCoLoss):
    """MoCo's model: a query encoder, a key encoder that is its moving average, and the queue.

    base_encoder: called with num_classes=dim, returns an encoder; dim, K, T: as for `MoCoLoss`; m: the momentum of the
    key encoder; mlp: whether the encoder's last layer `fc` is replaced by two layers, as in MoCo v2.
    forward(im_q, im_k) returns logits and labels for a cross-entropy, as MoCo does. The logits are [N, 2] instead of
    [N, 1 + K]: the positive, and the log-sum-exp of the queue. Their cross-entropy is the same. An accuracy computed
    from them counts the rows whose positive outweighs all negatives together, and a top-5 accuracy does not exist. With
    several processes, the key batch is shuffled between them, as MoCo does for BatchNorm.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
    ) -> None:
        encoders = [base_encoder(num_classes=dim) for _ in range(2)]
        if mlp:
            for encoder in encoders:
                width = encoder.fc.weight.shape[1]
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        super().__init__(dim, K, T)
        self.m: float = m
        self.encoder_q: nn.Module = encoders[0]
        self.encoder_k: nn.Module = encoders[1]
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            mixed, back = _shuffled(im_k)
            k = _own(F.normalize(self.encoder_k(mixed), dim=1), back)
        neg, pos = candidates.partners(q, k, Further(self._negatives(q)), self._tau, False, None)
        self._dequeue_and_enqueue(k)
        logits = torch.stack([pos, neg], 1)
        return shared.as_given(logits, q), torch.zeros(len(q), dtype=torch.int64, device=q.device)

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        for of_q, of_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            of_k.lerp_(of_q, 1 - self.m)


def _together(x: Tensor) -> Tensor:
    """The samples [n, ...] of all processes, each of which has as many."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _own(x: Tensor, order: Tensor | None) -> Tensor:
    """This process's share of the samples of all processes, in the given order; without an order, x itself."""
    if order is None:
        return x
    return _together(x)[order.view(dist.get_world_size(), -1)[dist.get_rank()]]


def _shuffled(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Samples exchanged between processes, so that BatchNorm's statistics do not reveal pairs; and the order back."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x, None
    order = torch.randperm(len(x) * dist.get_world_size(), device=x.device)
    dist.broadcast(order, src=0)
    return _own(x, order), order.argsort()
