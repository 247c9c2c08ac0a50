"""The loss of a batch that is spread over processes: the same bits on every rank, and the gradient of one process.

Rank r has rows o_r .. o_r + n_r of the whole batch, which is the concatenation of all shares in the order of ranks.
The rows are gathered once. A rank computes its own anchors against all columns and gathers what they give, so that
every rank adds the same numbers in the same order. In the backward it makes the gradient of its own rows from the
values and upstream gradients of all anchors; no gradient is sent.

The gradient of rank r is that of the sum over the ranks of what they return. Where gradients are averaged over the
ranks afterwards, as DistributedDataParallel does, that is the gradient of a single process with the whole batch.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .general import Keys, Settings
from .symmetric import ordered_sum

Group = Any  # None, "world", a torch.distributed.ProcessGroup or a DeviceMesh of one dimension
FACTS = "rows", "negatives", "width", "sets", "leading dimensions", "dtype", "settings", "inputs that need a gradient"
MAY_DIFFER = "rows", "negatives"
P = ParamSpec("P")
T = TypeVar("T")


class Process:
    """This rank's part in one call of a loss.

    shares: rows of each rank; negatives: negatives of each rank; both known once the ranks have agreed.
    """

    def __init__(self, group: "dist.ProcessGroup", shares: Sequence[int] | None) -> None:
        self.name, self.rank, self.size = group.group_name, dist.get_rank(group), dist.get_world_size(group)
        self.devices = [device.type for device in group._device_types]
        self.promised = shares
        self.shares: list[int] = []
        self.negatives: list[int] = []
        self.agreed = False

    @property
    def first(self) -> int:
        return sum(self.shares[: self.rank])

    @property
    def own(self) -> int:
        return self.shares[self.rank]

    def agree(self, like: Tensor, **facts: int) -> None:
        """All ranks compare what they have, and learn everybody's shares. facts: by the names of FACTS"""
        if self.agreed:
            return
        if like.device.type not in self.devices:
            raise ValueError(f"group: found rows on {like.device}, wanted one of the group's devices {self.devices}")
        if self.promised is not None:
            self._keep_promise(facts["rows"])
        self.agreed = True
        if self.promised is not None and os.environ.get("TCLR_KERNELS_CHECK") != "1":
            self.shares, self.negatives = list(self.promised), [facts["negatives"]] * self.size
        else:
            table = self._exchange(like.device, [0, *(facts[name] for name in FACTS)])
            self._compare(table)
            self.shares, self.negatives = ([row[1 + FACTS.index(name)] for row in table] for name in MAY_DIFFER)
            if self.promised is not None and self.shares != list(self.promised):
                raise ValueError(f"shares: found {list(self.promised)}, wanted the rows of each rank, {self.shares}")
        if sum(self.shares) == 0:
            raise ValueError("group: found no rows on any rank, wanted one at least")

    def fail(self) -> None:
        """Tells the other ranks that this one raises an error, unless they were told not to ask."""
        if not self.agreed and (self.promised is None or os.environ.get("TCLR_KERNELS_CHECK") == "1"):
            self.agreed = True
            device = "cpu" if "cpu" in self.devices else self.devices[0]
            self._exchange(torch.device(device), [1] + [0] * len(FACTS))

    def _keep_promise(self, rows: int) -> None:
        wanted = f"{self.size} integers >= 0, one for each rank, this rank's being its {rows} rows"
        if len(self.promised) != self.size or self.promised[self.rank] != rows:
            raise ValueError(f"shares: found {list(self.promised)}, wanted {wanted} (rank {self.rank})")

    def _exchange(self, device: torch.device, row: list[int]) -> list[list[int]]:
        """The rows of all ranks. The one value that is read on the host."""
        mine = torch.tensor([row], dtype=torch.int64).to(device)
        return self.all_gather(mine).tolist()

    def _compare(self, table: list[list[int]]) -> None:
        for rank, (failed, *_) in enumerate(table):
            if failed:
                raise RuntimeError(
                    f"group: rank {rank} of {self.size} raised an error in this call; see its own message"
                )
        for k, name in enumerate(FACTS):
            found = [row[1 + k] for row in table]
            if name not in MAY_DIFFER and len(set(found)) > 1:
                values = (
                    f": found {found}, wanted one value" if name in ("width", "sets") else ", wanted the same on all"
                )
                raise ValueError(f"group: ranks differ in {name}{values}")

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors, of one shape, joined along the first dimension."""
        call = torch.ops._c10d_functional
        return call.wait_tensor(call.all_gather_into_tensor(x.contiguous(), self.size, self.name))

    def gather(self, x: Tensor, dim: int, counts: Sequence[int]) -> Tensor:
        """The ranks' tensors, of so many entries along a dimension, joined along it in the order of ranks."""
        largest = max(*counts, 1)
        x = x.movedim(dim, 0)
        if len(x) < largest:
            x = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])])
        parts = self.all_gather(x).split(largest)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).movedim(0, dim)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, added in their order, so that all get the same bits."""
        parts = self.all_gather(x.double()[None])
        return functools.reduce(torch.add, parts.unbind(0)).to(x.dtype)


def resolve(group: Group, shares: Sequence[int] | None) -> Process | None:
    """This rank's part; None for a single process."""
    if group is None:
        if shares is not None:
            raise ValueError(f"shares: found {shares!r} without a group, wanted None")
        return None
    if shares is not None:
        whole = isinstance(shares, Sequence) and all(isinstance(n, int) and n >= 0 for n in shares)
        if not whole:
            raise TypeError(f"shares: found {shares!r}, wanted a list of integers >= 0, the rows of each rank")
    if group == "world":
        if not (dist.is_available() and dist.is_initialized()):
            return None
        return Process(dist.group.WORLD, shares)
    wanted = 'None, "world", a torch.distributed.ProcessGroup or a DeviceMesh of one dimension'
    if isinstance(group, getattr(dist, "DeviceMesh", ())):
        if group.ndim != 1:
            raise ValueError(f"group: found a DeviceMesh of {group.ndim} dimensions, wanted {wanted}")
        group = group.get_group()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: found {group!r}, wanted {wanted}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: found a group that this rank is not of")
    return Process(group, shares)


def digest(*settings: object) -> int:
    """A number that is the same on all ranks where the settings are."""
    return int.from_bytes(hashlib.sha256(repr(settings).encode()).digest()[:7], "big")


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """A loss that takes `group` and `shares`: the function gets this rank's part as its group, or None.

    An error of this rank before the ranks have agreed is told to the others, so that all of them raise one.
    """

    @functools.wraps(function)
    def call(*arguments: Any, group: Group = None, shares: Sequence[int] | None = None, **settings: Any) -> Any:
        process = resolve(group, shares)
        if process is None:
            return function(*arguments, **settings)
        try:
            return function(*arguments, group=process, **settings)
        except Exception:
            process.fail()
            raise

    return call


class Blocks(torch.autograd.Function):
    """What `general.rectangle` gives for all anchors of all ranks, [G, V, V, N], from this rank's rows.

    columns: the rows of all ranks, gathered; keys: the same with this rank's keys.
    """

    @staticmethod
    def forward(
        process: Process,
        settings: Settings,
        tau: float | Tensor,
        row_keys: Tensor | None,
        column_keys: Tensor | None,
        V: int,
        *sets: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, columns = sets[:V], sets[V:]
        backend = backends.BACKENDS[settings.name]
        extra = () if settings.name == "reference" else (False,)
        outputs = backend.rectangle(rows, columns, tau, *settings[1:], row_keys, column_keys, *extra)
        outputs = outputs[:2] if row_keys is None else outputs[:5]
        return process.gather(torch.stack(outputs), -1, process.shares).unbind(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.process, ctx.settings, tau, row_keys, column_keys, ctx.V, *sets = inputs
        ctx.mark_non_differentiable(*output[4:])
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tau if ctx.tau is None else None, row_keys, column_keys, *sets, *output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        tau, row_keys, column_keys, *tensors = ctx.saved_tensors
        tau, V = tau if ctx.tau is None else ctx.tau, ctx.V
        rows, columns, outputs = tensors[:V], tensors[V : 2 * V], tensors[2 * V :]
        g = [torch.zeros_like(outputs[0]) if x is None else x for x in upstream]
        anchors = [outputs[0], *g[:2]]
        if row_keys is not None:
            anchors += [outputs[2], *g[2:4], outputs[4]]
        first, own = ctx.process.first, ctx.process.own
        of_rows = [x.narrow(-1, first, own) for x in anchors]
        keys = row_keys, column_keys
        call = backends.BACKENDS[ctx.settings.name].rectangle_backward
        d_rows, _, along = call(rows, columns, tau, *ctx.settings[1:], *keys, of_rows, anchors, True, False)
        d_tau = (ordered_sum(along) / (-2 * tau)).to(tau) if ctx.needs_input_grad[2] else None
        return None, None, d_tau, None, None, None, *d_rows, *([None] * V)


class Negatives(torch.autograd.Function):
    """The log-sum-exp of all anchors' similarities to extra negatives: [G, A, 1, N] of A row sets [G, N, D].

    mine, everybody: the negatives of this rank and of all ranks, [1 or G, K, D]; the same where each rank has all.
    sets: this rank's rows, then those of all ranks.
    """

    @staticmethod
    def forward(
        process: Process,
        settings: Settings,
        tau: float | Tensor,
        A: int,
        mine: Tensor,
        everybody: Tensor,
        *sets: Tensor,
    ) -> Tensor:
        backend = backends.BACKENDS[settings.name]
        extra = () if settings.name == "reference" else (False,)
        rows = _one_set(sets[:A], everybody)
        neg = backend.rectangle([rows], [everybody], tau, *settings[1:], None, None, *extra)[0]
        G, n, _ = sets[0].shape
        return process.gather(neg.reshape(G, A, 1, n), -1, process.shares)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.process, ctx.settings, tau, ctx.A, *tensors = inputs
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.save_for_backward(tau if ctx.tau is None else None, *tensors, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        tau, mine, everybody, *sets, neg = ctx.saved_tensors
        tau, A, process = tau if ctx.tau is None else ctx.tau, ctx.A, ctx.process
        of_all = neg, g, torch.zeros_like(g)
        of_mine = [x.narrow(-1, process.first, process.own) for x in of_all]

        def gradient(rows, columns, anchors, for_rows):
            anchors = [x.reshape(len(columns), 1, 1, -1) for x in anchors]
            call = backends.BACKENDS[ctx.settings.name].rectangle_backward
            none = None, None
            return call([rows], [columns], tau, *ctx.settings[1:], *none, anchors, [], for_rows, not for_rows)

        (d_rows,), _, along = gradient(_one_set(sets[:A], everybody), everybody, of_mine, True)
        d_sets = d_rows.reshape(len(sets[0]), A, *sets[0].shape[1:]).unbind(1)
        d_tau = (ordered_sum(along) / -tau).to(tau) if ctx.needs_input_grad[2] else None
        d_mine = None
        if ctx.needs_input_grad[4]:
            _, (d_mine,), _ = gradient(_one_set(sets[A:], everybody), mine, of_all, False)
        return None, None, d_tau, None, d_mine, None, *d_sets, *([None] * A)


def _one_set(sets: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Sets [G, n, D] as one of as many groups as the columns have: [G, A n, D] or [1, G A n, D]"""
    return torch.stack(list(sets), 1).reshape(len(columns), -1, sets[0].shape[-1])


class Total(torch.autograd.Function):
    """The sums that a loss returns. whole: those that every rank has; parts: those of which it has its own part.

    Backward: what arrives at all ranks, added up.
    """

    @staticmethod
    def forward(process: Process, whole: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        return whole.clone(), process.sum(parts) if parts.numel() else parts.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    def backward(ctx: Any, of_whole: Tensor, of_parts: Tensor) -> tuple[Tensor | None, ...]:
        upstream = ctx.process.sum(torch.cat([of_whole, of_parts]))
        return None, *upstream.split([len(of_whole), len(of_parts)])


class Own(torch.autograd.Function):
    """This rank's anchors out of all, along the last dimension. Backward: what arrives at every rank's own."""

    @staticmethod
    def forward(process: Process, x: Tensor) -> Tensor:
        return x.narrow(-1, process.first, process.own).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, ctx.process.gather(g, -1, ctx.process.shares)


class MeanGradient(torch.autograd.Function):
    """The temperature; its gradient is the mean over the ranks, the same on each."""

    @staticmethod
    def forward(process: Process, tau: Tensor) -> Tensor:
        return tau.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, ctx.process.sum(g) / ctx.process.size
