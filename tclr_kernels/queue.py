"""The rows of earlier batches, kept as negatives."""

import torch
from torch import Tensor, nn

from . import checks, distributed
from .backends.reference import unit_rows
from .distributed import Group, Shares


class NegativeQueue(nn.Module):
    """The last `size` rows that were given to it, as further negatives of a loss: a ring buffer on the module's device.

        queue = NegativeQueue(65536, 128)
        loss = info_nce(q, k, negatives=queue, in_batch=False)
        queue.enqueue(k)

    Over several processes it must be the same on each, as it is if all make it from one seed, or load it, and enqueue
    with `group=`: a loss takes its own queue for that of every process.

    Before it is full, random rows of length one fill the places that are left, so that the number of negatives is
    always `size`. Each loss takes a copy of the rows in the dtype of its inputs: enqueueing between the loss and its
    backward changes no gradient. Rows and position are buffers: in the state_dict, moved and cast with the module.
    normalize: whether rows are kept with length one; `normalize=True` of a loss does the same whatever is kept.
    Raises ValueError for sizes below 1.
    Source: MoCo, https://arxiv.org/abs/1911.05722, algorithm 1.
    """

    rows: Tensor  # [size, dim]
    position: Tensor  # where the next row goes, on the device: reading it here would wait for the device

    def __init__(self, size: int, dim: int, *, normalize: bool = True) -> None:
        super().__init__()
        checks.size("size", size)
        checks.size("dim", dim)
        checks.flag("normalize", normalize)
        self.normalize = normalize
        self.register_buffer("rows", unit_rows(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """A copy of the rows, [size, dim], for losses of one's own: later calls of `enqueue` leave it as it is."""
        return self.rows.clone()

    @torch.no_grad()
    @distributed.collective
    def enqueue(self, keys: Tensor, *, group: Group = None, shares: Shares = None) -> None:
        """Puts rows in the place of the oldest ones; of more than `size` the last stay.

        keys: [..., n, dim] on the module's device, of any floating-point dtype; no gradient flows into them.
        group, shares: as of the losses; each process then puts in the keys of all, so that its queue stays the same.
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
