"""Losses over several processes, with gloo on this machine: python -m benchmarks.processes COMMAND

exact    compares value and gradient with those of the same library's loss in a single process
sent     counts the collectives and bytes of one step, from the calls to PyTorch
compute  times the work of one rank for P = 1, 2, 4, 8 shares of one batch, without communication
speed    times two processes of one thread each, and one process of one and of two threads
page     writes the tables of `exact` and `sent` to docs/processes.md

Each measurement writes benchmarks/results/processes-<command>.csv. `compute` and `speed` need a quiet machine.
"""

import functools
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tclr_kernels as tk
from tclr_kernels import distributed
from tests.ranks import Error, Pool

from . import measure, peers, rows

PAGE = rows.ROOT / "docs" / "processes.md"
TAU, D = 0.2, 128
WHERE = "cpu", "threads", "torch", "tclr_kernels", "commit", "date"
COLUMNS = {
    "exact": ("provider", "P", "status", "value", "gradient", "cosine", "error", "scale", *WHERE),
    "sent": ("provider", "P", "rows", "dtype", "status", "forward", "backward", "handed", "wire", *WHERE),
    "compute": ("P", "rows", "status", "p50_ms", "p20_ms", "p80_ms", "ratio", "predicted", *WHERE),
    "speed": ("processes", "threads_each", "rows", "status", "p50_ms", "p20_ms", "p80_ms", *WHERE),
}


# ---- the losses for this rank's rows z = (a, b) and a scale 1 / tau; with `alone`, for all rows in a single process


def ours(name, z, scale, alone, shares=None):
    loss = getattr(tk, name)
    return loss(*z, logit_scale=scale, group=None if alone else "world", shares=None if alone else shares)


def open_clip(z, scale, alone, **settings):
    peers.hollow("open_clip")
    from open_clip.loss import ClipLoss

    place = {} if alone else dict(rank=dist.get_rank(), world_size=dist.get_world_size(), **settings)
    return ClipLoss(**place)(*(F.normalize(x, dim=1) for x in z), scale)


def lightly(z, scale, alone, **settings):
    peers.lightly(TAU)
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return NTXentLoss(temperature=TAU, **({} if alone else settings))(*z)


def metric_learning(z, scale, alone, **settings):
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    first = 0 if alone else dist.get_rank() * len(z[0])
    labels = torch.arange(first, first + len(z[0])).repeat(2)
    loss = NTXentLoss(temperature=TAU)
    return (loss if alone else DistributedLossWrapper(loss, **settings))(torch.cat(z), labels)


def as_text(settings):
    return ", ".join(f"{key}={value}" for key, value in settings.items())


PROVIDERS = {
    "tclr-kernels nt_xent": functools.partial(ours, "nt_xent"),
    "tclr-kernels clip_loss": functools.partial(ours, "clip_loss"),
}
for _call, _name, _choices in (
    (
        open_clip,
        "open_clip ClipLoss",
        [dict(local_loss=a, gather_with_grad=b) for a in (False, True) for b in (False, True)],
    ),
    (lightly, "lightly NTXentLoss", [dict(gather_distributed=x) for x in (False, True)]),
    (
        metric_learning,
        "pytorch-metric-learning DistributedLossWrapper(NTXentLoss)",
        [dict(efficient=x) for x in (False, True)],
    ),
):
    PROVIDERS |= {f"{_name}, {as_text(x)}": functools.partial(_call, **x) for x in _choices}
LEARNS_SCALE = "tclr-kernels", "open_clip"  # the others take no tensor as temperature


def inputs(n, P, dtype):
    """The rows of all ranks, in two correlated views, and a weight: [2, P n, D], [D, D]"""
    common, *own = torch.randn(3, P * n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([common + x for x in own]).to(dtype), torch.eye(D, dtype=dtype).requires_grad_()


# ---- exact


def step(provider, n, P, alone):
    """The value, and the gradients of a weight and of the scale, on one rank or in a single process."""
    x, w = inputs(n, P, torch.float64)
    scale = torch.tensor(1 / TAU, dtype=torch.float64, requires_grad=True)
    if not alone:
        x = x[:, dist.get_rank() * n :][:, :n]
    value = PROVIDERS[provider]((x @ w).unbind(0), scale, alone)
    value.backward()
    return value.item(), w.grad, float("nan") if scale.grad is None else scale.grad.item()


def step_of_rank(group, provider, n):
    """The value, and the gradients after DistributedDataParallel's averaging."""
    P = dist.get_world_size(group)
    value, g, g_scale = step(provider, n, P, False)
    g = torch.cat([g.flatten(), torch.tensor([g_scale], dtype=torch.float64)])
    dist.all_reduce(g)
    return value, (g / P).numpy()


def against_one_process(pool, provider, n=32):
    P = len(pool.pipes)
    value, g, g_scale = step(provider, n, P, True)
    found = pool.run(P, step_of_rank, provider, n)
    if errors := [x for x in found if isinstance(x, Error)]:
        raise RuntimeError(errors[0])
    mean = torch.from_numpy(found[0][1])
    got, wanted = mean[:-1], g.flatten()
    same = all(x[0] == found[0][0] for x in found)
    return {
        "value": f"{found[0][0] / value:.6g}" + ("" if same else ", differs by rank"),
        "gradient": f"{(got @ wanted / (wanted @ wanted)).item():.6g}",
        "cosine": f"{(got @ wanted / got.norm() / wanted.norm()).item():.6g}",
        "error": f"{((got - wanted).abs().max() / wanted.abs().max()).item():.2g}",
        "scale": f"{mean[-1].item() / g_scale:.6g}" if provider.startswith(LEARNS_SCALE) else "",
    }


def exact():
    for P in (2, 4):
        with Pool(P) as pool:
            for provider in PROVIDERS:
                yield dict(provider=provider, P=P) | rows.attempted(against_one_process, pool, provider)


# ---- sent


class Counter(TorchDispatchMode):
    """Counts collectives. handed: the bytes given to them. wire: the bytes that a rank sends if P ranks form a ring."""

    def __init__(self, P):
        super().__init__()
        self.P, self.count, self.handed, self.wire = P, 0, 0, 0.0

    def __torch_dispatch__(self, call, types, arguments=(), settings=None):
        if call.namespace in ("c10d", "_c10d_functional") and "wait" not in call.name():
            self.add(call.name().split("::")[1].split(".")[0], arguments)
        return call(*arguments, **(settings or {}))

    def add(self, name, arguments):
        if name.startswith(("recv", "barrier")):
            return
        second = name in ("allgather_", "_allgather_base_", "reduce_scatter_", "alltoall_", "alltoall_base_")
        size = _bytes(arguments[1 if second else 0])
        self.count += 1
        self.handed += size
        if "gather" in name and "reduce" not in name:
            self.wire += size * (self.P - 1)
        elif "allreduce" in name or "all_reduce" in name:
            self.wire += 2 * size * (self.P - 1) / self.P
        elif name == "send":
            self.wire += size
        else:  # reduce_scatter, alltoall: everything but the rank's own part
            self.wire += size * (self.P - 1) / self.P


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def count(group, provider, n, dtype):
    P = dist.get_world_size(group)
    name, known, _ = provider.partition(", shares")
    x, w = inputs(n, P, dtype)
    scale = torch.tensor(1 / TAU, dtype=dtype, requires_grad=True)
    z = (x[:, dist.get_rank() * n :][:, :n] @ w).unbind(0)
    with Counter(P) as forward:
        value = PROVIDERS[name](z, scale, False, **(dict(shares=[n] * P) if known else {}))
    with Counter(P) as backward:
        value.backward()
    return {
        "forward": forward.count,
        "backward": backward.count,
        "handed": forward.handed + backward.handed,
        "wire": round(forward.wire + backward.wire),
    }


def counted(pool, *arguments):
    found = pool.run(len(pool.pipes), count, *arguments)
    if isinstance(found[0], Error):
        raise RuntimeError(found[0])
    return found[0]


def sent(n=32):
    names = [x for name in PROVIDERS for x in ([name, f"{name}, shares"] if name.startswith("tclr") else [name])]
    for P in (2, 4):
        with Pool(P) as pool:
            for dtype in (torch.float32, torch.bfloat16):
                for name in names:
                    made = rows.attempted(counted, pool, name, n, dtype)
                    yield dict(provider=name, P=P, rows=n, dtype=str(dtype).removeprefix("torch.")) | made


# ---- times


class Alone(distributed.Process):
    """A pretended first rank of P. The others have the same rows, so nothing is sent."""

    def __init__(self, P, n):
        self.name, self.rank, self.size, self.devices = "", 0, P, ["cpu"]
        self.promised, self.exchanges, self.agreed = [n] * P, False, False
        self.call = "", {}

    def all_gather(self, x):
        return x.repeat(self.size, *[1] * (x.dim() - 1))


def loss_and_gradient(call, *z):
    return torch.autograd.grad(call(*z), z)


def compute(N=4096, seconds=20.0):
    def step(P):
        z = [x.clone().requires_grad_() for x in torch.randn(2, N // P, D)]
        if P == 1:
            return functools.partial(loss_and_gradient, tk.nt_xent, *z)
        alone = tk.nt_xent.__wrapped__  # the loss itself, without the decorator for groups
        return lambda: loss_and_gradient(lambda a, b: alone(a, b, group=Alone(P, N // P)), *z)

    steps = {P: step(P) for P in (1, 2, 4, 8)}
    first = {P: measure.once(step)[0] for P, step in steps.items()}
    times = measure.interleaved(steps, first, seconds)
    whole = statistics.median(times[1])
    for P, taken in times.items():
        predicted = 1.0 if P == 1 else 1.5 / P
        ratio = statistics.median(taken) / whole
        yield dict(P=P, rows=2 * N, status="ok", ratio=f"{ratio:.3g}", predicted=predicted) | _percentiles(taken)


def seconds_of_rank(group, n, runs):
    torch.set_num_threads(1)
    z = [x.clone().requires_grad_() for x in torch.randn(2, n, D)]
    loss = functools.partial(tk.nt_xent, group=group, shares=[n] * dist.get_world_size(group))
    loss_and_gradient(loss, *z)
    times = []
    for _ in range(runs):
        dist.barrier(group)
        times.append(measure.once(lambda: loss_and_gradient(loss, *z))[0])
    return times


def speed(N=4096, runs=7, rounds=5):
    """Times steps in turns, so that a slow minute of the machine affects all of them."""
    z = [x.clone().requires_grad_() for x in torch.randn(2, N, D)]
    times = {(1, 1): [], (1, 2): [], (2, 1): []}
    with Pool(2) as pool:
        for _ in range(rounds):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                loss_and_gradient(tk.nt_xent, *z)
                times[1, threads] += [measure.once(lambda: loss_and_gradient(tk.nt_xent, *z))[0] for _ in range(runs)]
            of_ranks = pool.run(2, seconds_of_rank, N // 2, runs, limit=600)
            times[2, 1] += [max(x) for x in zip(*of_ranks, strict=True)]
            time.sleep(0.1)
    for (processes, threads), seconds in times.items():
        yield dict(processes=processes, threads_each=threads, rows=2 * N, status="ok") | _percentiles(seconds)


def _percentiles(seconds):
    return {
        name: f"{x:.4g}" for name, x in zip(("p20_ms", "p50_ms", "p80_ms"), measure.percentiles(seconds), strict=True)
    }


# ---- the page


def table_exact():
    yield "| loss | P | value | gradient | its cosine | largest error | scale's gradient |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows.read(_path("exact")):
        if row["status"] != "ok":
            yield f"| {row['provider']} | {row['P']} | {row['status']} | | | | |"
            continue
        values = (row[key] for key in ("value", "gradient", "cosine", "error", "scale"))
        yield f"| {row['provider']} | {row['P']} | {' | '.join(values)} |"


def table_sent():
    yield "| loss | P | dtype | collectives, forward + backward | bytes handed to them | bytes sent round a ring |"
    yield "|---|---|---|---|---|---|"
    for row in rows.read(_path("sent")):
        if row["status"] != "ok":
            yield f"| {row['provider']} | {row['P']} | {row['dtype']} | {row['status']} | | |"
            continue
        sizes = (f"{int(row[key]):,}" for key in ("handed", "wire"))
        yield f"| {row['provider']} | {row['P']} | {row['dtype']} | {row['forward']} + {row['backward']} | " + (
            " | ".join(sizes) + " |"
        )


TABLES = {"exact": table_exact, "sent": table_sent}


def page():
    """The text of docs/processes.md, with its tables made from the committed rows."""
    text = PAGE.read_text()
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        text = before + begin + "\n".join(table()) + "\n" + end + after
    return text


def _path(name):
    return rows.RESULTS / f"processes-{name}.csv"


def main(arguments):
    commands = {"exact": exact, "sent": sent, "compute": compute, "speed": speed}
    if arguments == ["page"]:
        PAGE.write_text(page())
        return 0
    if len(arguments) != 1 or arguments[0] not in commands:
        print(__doc__)
        return 2
    name = arguments[0]
    return rows.record(_path(name), COLUMNS[name], commands[name]())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
