"""Losses of a batch that is spread over processes (ranks), with the same bits on every rank, and the gradient that a
single process with the whole batch would get.

The whole batch is the concatenation of the ranks' shares. Rank r has its rows o_r .. o_r + n_r. In the forward pass,
the rows are gathered once; each rank compares its own anchors with the rows of all ranks, and the results (a few
numbers for each anchor) are gathered. So every rank adds up the same numbers in the same order. In the backward pass,
each rank computes the gradient of its own rows, from the results and upstream gradients of all anchors. No gradients of
rows are sent.

The gradient on each rank is that of the sum of all ranks' results. Averaged over the ranks, as
DistributedDataParallel does, it is the gradient of a single process with the whole batch.
"""

import functools
import hashlib
import inspect
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import backends, checks
from .general import Settings, at_least_float32
from .symmetric import ordered_sum, traced, widened

Group = Any  # None, "world", a torch.distributed.ProcessGroup or a DeviceMesh of one dimension
Shares = Sequence[int] | None
P = ParamSpec("P")
T = TypeVar("T")


class Further(NamedTuple):
    """Further negatives: [K, D] or [..., K, D].

    everywhere: whether all processes have the same ones, as in a queue, so that they need not be sent.
    sent_as: the dtype in which they are sent, if it is not that of `rows`.
    """

    rows: Tensor
    everywhere: bool = False
    sent_as: torch.dtype | None = None


class Facts(NamedTuple):
    """What a rank tells the others about its call. Everything is an integer, so that one tensor holds it."""

    failed: int = 0
    rows: int = 0
    negatives: int = 0
    negatives_of_b: int = 0
    width: int = 0
    sets: int = 0
    leading: int = 0
    dtype: int = 0
    settings: int = 0
    shares: int = 0
    gradients: int = 0


ALIKE = {  # the facts that must be equal on all ranks, and their names in errors
    "settings": "the loss or its settings",
    "shares": "shares, the rows of each rank",
    "dtype": "dtype",
    "width": "D, the width of the embeddings",
    "sets": "the number of sets or views",
    "leading": "the leading dimensions",
    "gradients": "which inputs require a gradient",
}
READABLE = "width", "sets", "dtype"  # errors show their values; the other facts are hashes


class Process:
    """This rank's part in one call of a loss. `shares`, the rows of each rank, are known after `agree`."""

    name: str  # the name of the group
    rank: int
    size: int
    devices: list[str]
    promised: Shares  # the argument `shares`
    exchanges: bool  # whether the ranks compare their facts
    agreed: bool  # whether `agree` was called
    dtype: torch.dtype  # the dtype of the rows, in which they are sent
    shares: list[int]
    negatives: list[list[int]]  # the number on each rank, for the first and the second tensor of negatives
    call: tuple[str, dict[str, object]]  # the loss and its arguments, until the ranks have agreed

    def __init__(self, group: "dist.ProcessGroup", promised: Shares) -> None:
        self.name, self.rank, self.size = group.group_name, dist.get_rank(group), dist.get_world_size(group)
        self.devices = _devices(self.name)
        self.promised = promised
        self.exchanges = promised is None or os.environ.get("TCLR_KERNELS_CHECK") == "1"
        self.agreed, self.dtype = False, torch.float32
        self.shares, self.negatives, self.call = [], [], ("", {})

    @property
    def first(self) -> int:
        return sum(self.shares[: self.rank])

    @property
    def own(self) -> int:
        return self.shares[self.rank]

    @property
    def rows(self) -> int:
        """The number of rows of all ranks."""
        return sum(self.shares)

    def begin(self, name: str, arguments: dict[str, object]) -> None:
        """Stores the arguments of the call, and checks those that can be checked alone."""
        self.call = name, arguments
        for argument, value in arguments.items():
            if any(map(_is_dtensor, _tensors(value))):
                raise TypeError(f"{argument}: found a DTensor beside a group, wanted this rank's rows: its .to_local()")
        if self.promised is not None and not (
            isinstance(self.promised, Sequence) and all(isinstance(n, int) and n >= 0 for n in self.promised)
        ):
            raise TypeError(
                f"shares: found {self.promised!r}, wanted a list of integers >= 0, the rows of each of "
                f"the {self.size} ranks"
            )

    def agree(self, like: Tensor, sets: int, negatives: Sequence[Further | None] = ()) -> None:
        """Compares the facts of all ranks and learns their shares; only the first call does anything. like: [..., n, D]

        All checks of this rank's arguments must come before, because afterwards the others wait for its rows.
        """
        if self.agreed:
            return
        rows, self.dtype = like.shape[-2], like.dtype
        if like.device.type not in self.devices:
            raise ValueError(f"group: found embeddings on {like.device}, wanted one of its devices: {self.devices}")
        if self.promised is not None and (len(self.promised) != self.size or self.promised[self.rank] != rows):
            raise ValueError(
                f"shares: found {list(self.promised)}, wanted the rows of each of the {self.size} ranks, "
                f"of which rank {self.rank} has {rows}"
            )
        gathered = [x is not None and not x.everywhere for x in negatives]
        counts = [x.rows.shape[-2] if there else 0 for x, there in zip(negatives, gathered, strict=True)]
        if self.exchanges:
            facts = Facts(rows=rows, **dict(zip(("negatives", "negatives_of_b"), counts, strict=False)))
            table = self._exchange(self._complete(facts, like, sets))
            self._compare(table)
            self.shares = [facts.rows for facts in table]
            self.negatives = [[facts.negatives for facts in table], [facts.negatives_of_b for facts in table]]
        else:
            self.shares, self.negatives = list(self.promised), [[n] * self.size for n in counts]
        self.agreed, self.call = True, ("", {})
        if self.rows == 0:
            raise ValueError("group: found no rows on any rank, wanted one at least")
        if any(there and not sum(found) for there, found in zip(gathered, self.negatives, strict=False)):
            raise ValueError("negatives: found none on any rank, wanted one at least")

    def _complete(self, facts: Facts, like: Tensor, sets: int) -> Facts:
        name, arguments = self.call
        arguments = {key: value for key, value in arguments.items() if key not in ("backend", "group", "shares")}
        needed = [torch.is_grad_enabled() and x.requires_grad for value in arguments.values() for x in _tensors(value)]
        return facts._replace(
            width=like.shape[-1],
            sets=sets,
            leading=_digest(list(like.shape[:-2])),
            dtype=checks.DTYPES.index(like.dtype),
            settings=_digest(name, sorted((key, _plain(value)) for key, value in arguments.items())),
            shares=_digest(None if self.promised is None else list(self.promised)),
            gradients=_digest(needed),
        )

    def fail(self) -> None:
        """Tells the other ranks, if they compare facts, that this one raises an error."""
        if self.exchanges and not self.agreed:
            self._exchange(Facts(failed=1))

    def _exchange(self, mine: Facts) -> list[Facts]:
        """The facts of all ranks. They are read on the host, so they are sent on the CPU if the group can."""
        self.agreed = True
        device = "cpu" if "cpu" in self.devices else self.devices[0]
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("shares: found None while a CUDA graph is captured, wanted the rows of each rank")
        return [Facts(*row) for row in self.all_gather(torch.tensor([mine], device=device)).tolist()]

    def _compare(self, table: list[Facts]) -> None:
        for rank, facts in enumerate(table):
            if facts.failed:
                raise RuntimeError(f"group: rank {rank} of {self.size} raised an error in this call; see its message")
        for field, name in ALIKE.items():
            found = [getattr(facts, field) for facts in table]
            if len(set(found)) > 1:
                found = [str(checks.DTYPES[k]) for k in found] if field == "dtype" else found
                values = f": found {found}, wanted one value" if field in READABLE else ", wanted the same on all"
                raise ValueError(f"group: ranks differ in {name}{values}")
        for field in ("negatives", "negatives_of_b") if self.promised is not None else ():
            found = [getattr(facts, field) for facts in table]
            if len(set(found)) > 1:
                raise ValueError(f"negatives: found K = {found} on the ranks, wanted one value beside shares")

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, concatenated along the first dimension."""
        call = torch.ops._c10d_functional
        return call.wait_tensor(call.all_gather_into_tensor(x.contiguous(), self.size, self.name))

    def gather(self, x: Tensor, dim: int, counts: Sequence[int]) -> Tensor:
        """The tensors of all ranks, concatenated along a dimension, in which rank r has counts[r] entries."""
        largest = max(*counts, 1)
        x = x.movedim(dim, 0)
        if len(x) < largest:  # also if it is empty, since gloo would abort
            x = torch.cat([x, x.new_zeros(largest - len(x), *x.shape[1:])])
        together = self.all_gather(x)
        if min(counts) == largest:
            return together.movedim(0, dim)
        parts = together.split(largest)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).movedim(0, dim)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks in float64, added in their order, so that all ranks get the same bits."""
        return functools.reduce(torch.add, self.all_gather(x.double()[None]).unbind(0)).to(x.dtype)


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a loss with the arguments `group` and `shares`. In its body, `group` is this rank's Process or None.

    If this rank raises an error before the ranks have agreed, the others are told and raise one too.
    """
    parameters = inspect.signature(function).parameters
    names, defaults = list(parameters), {name: x.default for name, x in parameters.items() if x.default is not x.empty}

    @functools.wraps(function)
    def call(*arguments: P.args, **settings: P.kwargs) -> T:
        group, shares = settings.get("group"), settings.get("shares")
        if group is None and shares is None:
            return function(*arguments, **settings)
        process = _process(group, shares)
        if process is not None and process.exchanges and torch.compiler.is_compiling():
            return _untraced(call, arguments, settings)
        settings = {**settings, "group": process, "shares": None}
        if process is None:
            return function(*arguments, **settings)
        try:
            process.begin(function.__name__, defaults | dict(zip(names, arguments, strict=False)) | settings)
            return function(*arguments, **settings)
        except Exception:
            process.fail()
            raise

    return call


def _untraced(call: Callable[..., T], arguments: tuple[Any, ...], settings: dict[str, Any]) -> T:
    return torch.compiler.disable(call)(*arguments, **settings)


# These attributes do what torch.compiler.disable does, whose import takes two seconds.
_untraced._torchdynamo_disable = True
_untraced._torchdynamo_disable_msg = "without `shares` the ranks tell each other on the host how many rows they have"


def check_group(group: Group) -> None:
    """Raises TypeError or ValueError if the argument is not a group."""
    wanted = 'None, "world", a torch.distributed.ProcessGroup or a DeviceMesh of one dimension'
    if group is None or (isinstance(group, str) and group == "world"):
        return
    if not dist.is_available():
        raise TypeError(f"group: found {group!r}, wanted None: this PyTorch has no torch.distributed")
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: found a DeviceMesh of {group.ndim} dimensions, wanted {wanted}")
    elif group is not dist.GroupMember.NON_GROUP_MEMBER and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: found {group!r}, wanted {wanted}")


def _process(group: Group, shares: Shares) -> Process | None:
    """This rank's part in a call; None if the process is alone."""
    if group is None:
        raise ValueError(f"shares: found {shares!r} without a group, wanted None")
    check_group(group)
    if isinstance(group, str):
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD
    elif isinstance(group, dist.DeviceMesh):
        group = dist.GroupMember.NON_GROUP_MEMBER if group.get_coordinate() is None else group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks, and must not call the loss with it")
    return None if shares is None and dist.get_world_size(group) == 1 else Process(group, shares)


def _devices(name: str) -> list[str]:
    """The device types whose tensors a group can send."""
    return [device.type for device in dist.distributed_c10d._resolve_process_group(name)._device_types]


_devices._dynamo_marked_constant = True  # see `checks.tf32_allowed`


def _is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, but imported if x is a DTensor
    return module is not None and isinstance(x, module.DTensor)


def _tensors(value: object) -> list[Tensor]:
    """The tensors in an argument: a tensor, a list of them, or a queue."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return list(value.buffers())
    return [x for item in value for x in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _digest(*values: object) -> int:
    """A hash of values that is the same on all ranks."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7], "big")


def _plain(value: object) -> object:
    """The part of an argument that must be equal on all ranks, in a form with a reproducible repr."""
    if isinstance(value, torch.Tensor):
        return "a tensor", value.dim()  # the number of dimensions tells shared negatives from those of each group
    if isinstance(value, nn.Module):  # a queue
        return [list(x.shape) for x in value.buffers()]
    if isinstance(value, Mapping):
        return sorted((key, _plain(x)) for key, x in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def contrast(
    process: Process,
    settings: Settings,
    tau: float | Tensor,
    keys: Tensor | None,
    sets: Sequence[Tensor],
    negatives: Sequence[Further | None] | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs of `general.rectangle` for the anchors of all ranks, and the log-sum-exp of their further negatives.

    sets: this rank's rows, [G, n, D] each.
    keys: their labels, [G, n].
    negatives: a list of one, for all sets, or of one (or None) for each set.
    Returns the outputs, [G, V, V, N], and the log-sum-exp, [G, V, N], or None.
    """
    all_keys = None if keys is None else process.gather(keys, -1, process.shares)
    if negatives is not None:
        tau, sets = at_least_float32(tau), widened(settings.name, *sets)
    columns = gathered(process, sets)
    outputs = traced(Blocks, process, settings, tau, keys, all_keys, len(sets), *sets, *columns)
    return outputs, None if negatives is None else further_log_sum(process, settings, tau, sets, columns, negatives)


def gathered(process: Process, sets: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all ranks: from sets [G, n, D] to [G, N, D]. They are sent in the dtype that the user gave."""
    rows = torch.stack(list(sets)).detach().to(process.dtype)
    return list(process.gather(rows, -2, process.shares).to(sets[0].dtype).unbind(0))


def further_log_sum(
    process: Process,
    settings: Settings,
    tau: float | Tensor,
    sets: Sequence[Tensor],
    columns: Sequence[Tensor],
    negatives: Sequence[Further | None],
) -> Tensor:
    """The log-sum-exp of the further negatives of all anchors: [G, V, N]. columns: the rows of all ranks."""
    settings = settings._replace(first=-1, cross=False)
    parts = []
    for k, further in enumerate(negatives):
        own, everyone = (sets, columns) if len(negatives) == 1 else (sets[k : k + 1], columns[k : k + 1])
        G, _, D = own[0].shape
        if further is None:
            absent = torch.full((G, 1, process.rows), -torch.inf, dtype=torch.float64, device=own[0].device)
            parts.append(absent)
            continue
        mine = further.rows.reshape(1 if further.rows.dim() == 2 else G, -1, D)
        sent = mine.detach().to(further.sent_as or mine.dtype)
        everybody = mine if further.everywhere else process.gather(sent, -2, process.negatives[k])
        mine, everybody = at_least_float32(mine), at_least_float32(everybody)
        values = traced(Negatives, process, settings, tau, len(own), mine, everybody, *own, *everyone)
        parts.append(values[:, :, 0])
    return torch.cat(parts, 1)


class Blocks(torch.autograd.Function):
    """The outputs of `general.rectangle` for the anchors of all ranks, [G, V, V, N].

    The sets are first this rank's rows, then the rows of all ranks; likewise row_keys and column_keys.
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
        call = backends.BACKENDS[settings.name].rectangle
        how = *settings[1:3], process.first, row_keys, column_keys
        outputs = call(rows, columns, tau, *how, False, settings.half)
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
    @once_differentiable
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
        call, how = backends.BACKENDS[ctx.settings.name].rectangle_backward, (*ctx.settings[1:3], first, *keys)
        # along: <r, dr> of each row, whose sum gives the gradient of the temperature
        d_rows, _, along = call(rows, columns, tau, *how, of_rows, anchors, True, False, ctx.settings.half)
        d_tau = (ordered_sum(along) / (-2 * tau)).to(tau) if ctx.needs_input_grad[2] else None
        return None, None, d_tau, None, None, None, *d_rows, *([None] * V)


class Negatives(torch.autograd.Function):
    """The log-sum-exp of further negatives for the anchors of all ranks: [G, A, 1, N], from A sets of rows.

    mine, everybody: the negatives of this rank and of all ranks, [1 or G, K, D]. For a queue, both are the same.
    sets: this rank's rows, then the rows of all ranks.
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
        rows = _one_set(sets[:A], everybody)
        call = backends.BACKENDS[settings.name].rectangle
        neg = call([rows], [everybody], tau, *settings[1:4], None, None, False, settings.half)[0]
        G, n, _ = sets[0].shape
        return process.gather(neg.reshape(G, A, 1, n), -1, process.shares)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.process, ctx.settings, tau, ctx.A, *tensors = inputs
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.save_for_backward(tau if ctx.tau is None else None, *tensors, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        tau, mine, everybody, *sets, neg = ctx.saved_tensors
        tau, A, process = tau if ctx.tau is None else ctx.tau, ctx.A, ctx.process
        of_all = neg, g, torch.zeros_like(g)
        of_mine = [x.narrow(-1, process.first, process.own) for x in of_all]

        def gradient(rows, columns, anchors, for_rows):
            anchors = [x.reshape(len(columns), 1, 1, -1) for x in anchors]
            call = backends.BACKENDS[ctx.settings.name].rectangle_backward
            how = *ctx.settings[1:4], None, None
            return call([rows], [columns], tau, *how, anchors, [], for_rows, not for_rows, ctx.settings.half)

        (d_rows,), _, along = gradient(_one_set(sets[:A], everybody), everybody, of_mine, True)
        d_sets = d_rows.reshape(len(sets[0]), A, *sets[0].shape[1:]).unbind(1)
        d_tau = (ordered_sum(along) / -tau).to(tau) if ctx.needs_input_grad[2] else None
        d_mine = None
        if ctx.needs_input_grad[4]:
            _, (d_mine,), _ = gradient(_one_set(sets[A:], everybody), mine, of_all, False)
        return None, None, d_tau, None, d_mine, None, *d_sets, *([None] * A)


def _one_set(sets: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Joins A sets [G, n, D] into one, with as many groups as the columns have: [G, A n, D] or [1, G A n, D]"""
    return torch.stack(list(sets), 1).reshape(len(columns), -1, sets[0].shape[-1])


class Total(torch.autograd.Function):
    """The sums [k] that a loss returns. own: for each, True if this rank has only its part of it, False if all of it.

    Backward: the sum of the upstream gradients of all ranks.
    """

    @staticmethod
    def forward(process: Process, sums: Tensor, own: tuple[bool, ...]) -> Tensor:
        if not any(own):
            return sums.clone()
        together = process.sum(sums)
        return torch.stack([together[k] if part else sums[k] for k, part in enumerate(own)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.process.sum(g), None


class Own(torch.autograd.Function):
    """Takes this rank's anchors from those of all ranks, last dimension. Backward: gathers the upstream gradients."""

    @staticmethod
    def forward(process: Process, x: Tensor) -> Tensor:
        return x.narrow(-1, process.first, process.own).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, ctx.process.gather(g, -1, ctx.process.shares)


class Everybody(torch.autograd.Function):
    """Gathers the numbers of all ranks' anchors, last dimension. Backward: takes those of this rank's anchors."""

    @staticmethod
    def forward(process: Process, x: Tensor) -> Tensor:
        return process.gather(x, -1, process.shares)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g.narrow(-1, ctx.process.first, ctx.process.own)


def shared(process: Process, tau: float | Tensor, device: torch.device) -> float | Tensor:
    """The temperature, on the device of the rows. Its gradient is the whole one on every rank."""
    return traced(MeanGradient, process, tau.to(device)) if isinstance(tau, torch.Tensor) else tau


class MeanGradient(torch.autograd.Function):
    """The identity. Backward: the mean of the upstream gradients of all ranks, the same on each."""

    @staticmethod
    def forward(process: Process, tau: Tensor) -> Tensor:
        return tau.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.process = inputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, ctx.process.sum(g) / ctx.process.size
