"""A queue of rows of earlier batches, to be used as negatives."""

import torch
from torch import Tensor, nn

from . import checks, distributed
from .backends.reference import unit_rows
from .distributed import Group, Shares


class NegativeQueue(nn.Module):
    """Keeps the last `size` rows that it was given, as further negatives of a loss.

        queue = NegativeQueue(65536, 128)
        loss = info_nce(q, k, negatives=queue, in_batch=False)
        queue.enqueue(k)

    At first the queue holds random rows of length one, so the number of negatives is always `size`. Each loss copies
    the rows in the dtype of its inputs, so enqueueing between the loss and its backward pass changes no gradient. Rows
    and position are buffers: they are part of the state_dict, and are moved and cast with the module.

    With several processes, the queue must be the same on each. It is, if all processes create it from the same seed (or
    load it) and enqueue with `group=`.

    normalize: whether rows are normalised before they are stored. A loss with `normalize=True` normalises them anyway.
    Raises ValueError for sizes below 1.
    Source: MoCo, https://arxiv.org/abs/1911.05722, algorithm 1.
    """

    rows: Tensor  # [size, dim]
    position: Tensor  # where the next row goes; it stays on the device, since reading it would wait for the device

    def __init__(self, size: int, dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        checks.size("size", size)
        checks.size("dim", dim)
        checks.flag("normalize", normalize)
        self.normalize = normalize
        self.register_buffer("rows", unit_rows(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """A copy of the rows, [size, dim], for a loss of your own; later calls of `enqueue` do not change it."""
        return self.rows.clone()

    @torch.no_grad()
    @distributed.collective
    def enqueue(self, keys: Tensor, *, group: Group = None, shares: Shares = None) -> None:
        """Replaces the oldest rows by new ones; of more than `size` new rows, the last ones are kept.

        keys: [..., n, dim] on the module's device, of any floating-point dtype. They get no gradient.
        group, shares: as for the losses. Each process then enqueues the keys of all, so that the queues stay the same.
        Raises TypeError or ValueError, naming keys, for a wrong type, size, dtype or device, and for an empty tensor.
        """
        size, dim = self.rows.shape
        keys = checks.queued(keys, self.rows, group is not None)
        if group is not None:
            group.agree(keys, 1)
            keys = group.gather(keys, -2, group.shares)
        keys = keys.reshape(-1, dim)
        n = len(keys)
        keys = keys[-size:].to(torch.promote_types(keys.dtype, torch.float32))
        places = (self.position + torch.arange(n - len(keys), n, device=self.rows.device)) % size
        self.rows.index_copy_(0, places, (unit_rows(keys) if self.normalize else keys).to(self.rows.dtype))
        self.position.copy_((self.position + n) % size)

    def extra_repr(self) -> str:
        size, dim = self.rows.shape
        return f"size={size}, dim={dim}, normalize={self.normalize}"
