"""Networks that several processes train get the weights of a single process with the whole batch."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tclr_kernels as tk

from .ranks import Error

STEPS = 6
SHARES = {2: [[4, 4], [6, 2], [8, 0]], 3: [[3, 3, 2], [5, 0, 3], [1, 1, 6]]}


class Net(nn.Module):
    """A small network. inside: whether it has the temperature as a parameter, or the loss has it."""

    def __init__(self, inside):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
        self.tau = nn.Parameter(torch.tensor(0.3)) if inside else None
        self.double()

    def forward(self, x):
        return self.layers(x), None if self.tau is None else self.tau * 1


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 5, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def own_part(x, shares, rank):
    return x.narrow(1, sum(shares[:rank]), shares[rank])


def make(optimizer, parameters):
    return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](parameters, lr=0.05)


class Run:
    """A network, its loss and its optimizer. wrap(net, tau): the network with gradients averaged over the ranks."""

    def __init__(self, inside, optimizer, group=None, wrap=lambda net, tau: net):
        net = Net(inside)
        own = None if inside else nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.net, self.tau, self.group = wrap(net, net.tau), own, group
        self.optimizer = make(optimizer, [*self.net.parameters(), *([] if inside else [own])])

    def forward(self, x, shares=None, reduction="mean"):
        z, tau = self.net(x)
        settings = dict(temperature=self.tau if tau is None else tau, reduction=reduction)
        return tk.nt_xent(*z, group=self.group, shares=shares, backend="reference", **settings)

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.net.parameters()]
        return [x.detach().numpy().copy() for x in (*whole, *([] if self.tau is None else [self.tau]))]


def averaged(group, how):
    """A function that wraps a network, so that gradients are averaged over the ranks."""
    if how == "ddp":
        return lambda net, tau: DistributedDataParallel(net, process_group=group)
    mesh = dist.DeviceMesh.from_group(group, "cpu")

    def wrap(net, tau):
        ignored = set() if tau is None else {tau}
        return fully_shard(net, mesh=mesh, ignored_params=ignored)

    return wrap


def train(group, how, optimizer, inside, plan):
    run, rank = Run(inside, optimizer, group, averaged(group, how)), dist.get_rank(group)
    for step, x in enumerate(batches()):
        shares = plan[step % len(plan)]
        run.forward(own_part(x, shares, rank), shares if step % 2 else None).backward()
        run.step()
    return run.weights()


def one_process(inside, optimizer):
    run = Run(inside, optimizer)
    for x in batches():
        run.forward(x).backward()
        run.step()
    return run.weights()


def check(found, wanted, bound=1e-12):
    assert not any(isinstance(x, Error) for x in found), found
    for weights in found:
        assert all((x == y).all() for x, y in zip(weights, found[0], strict=True))
        for x, y in zip(weights, wanted, strict=True):
            assert abs(x - y).max() <= bound * max(1, abs(y).max())


@pytest.mark.parametrize("inside", [True, False], ids=["tau inside", "tau outside"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("P", [2, 3])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_six_steps_give_the_weights_of_one_process(how, P, optimizer, inside, pool):
    found = pool.run(P, train, how, optimizer, inside, SHARES[P])
    check(found, one_process(inside, optimizer))


def accumulate(group, sync_last):
    """Trains with two batches per step. With sync_last, DDP averages only after the second one."""
    run, rank = Run(False, "sgd", group, averaged(group, "ddp")), dist.get_rank(group)
    micro = batches()
    for first, second in zip(micro[::2], micro[1::2], strict=True):
        with run.net.no_sync() if sync_last else contextlib.nullcontext():
            (run.forward(own_part(first, [6, 2], rank)) / 2).backward()
        (run.forward(own_part(second, [3, 5], rank)) / 2).backward()
        run.step()
    return run.weights()


@pytest.mark.parametrize("sync_last", [True, False], ids=["no_sync", "every batch"])
def test_accumulated_gradients_give_the_weights_of_one_process(sync_last, pool):
    run = Run(False, "sgd")
    micro = batches()
    for first, second in zip(micro[::2], micro[1::2], strict=True):
        for x in (first, second):
            (run.forward(x) / 2).backward()
        run.step()
    check(pool.run(2, accumulate, sync_last), run.weights())


def cached(group):
    """Trains with GradCache: first the loss of embeddings without a graph, then the network again in chunks."""
    run, rank = Run(False, "sgd", group, averaged(group, "ddp")), dist.get_rank(group)
    for x in batches()[:3]:
        own = own_part(x, [5, 3], rank)
        chunks = own.split(2, dim=1)
        with torch.no_grad():
            z = torch.cat([run.net(chunk)[0] for chunk in chunks], 1)
        z.requires_grad_()
        tk.nt_xent(*z, temperature=run.tau, group=group, backend="reference").backward()
        for k, (chunk, g) in enumerate(zip(chunks, z.grad.split(2, dim=1), strict=True)):
            with contextlib.nullcontext() if k == len(chunks) - 1 else run.net.no_sync():
                (run.net(chunk)[0] * g).sum().backward()
        run.step()
    return run.weights()


def test_gradcache_gives_the_weights_of_one_process(pool):
    run = Run(False, "sgd")
    for x in batches()[:3]:
        run.forward(x).backward()
        run.step()
    check(pool.run(2, cached), run.weights())


def scaled(group):
    """Trains with a GradScaler, with a NaN on one rank in one step. Returns the weights and the scales."""
    run, rank = Run(False, "sgd", group, averaged(group, "ddp")), dist.get_rank(group)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scales = []
    for step, x in enumerate(batches()[:4]):
        own = own_part(x, [5, 3], rank).clone()
        if step == 2 and rank == 1:
            own[0, 0, 0] = torch.nan
        scaler.scale(run.forward(own)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return run.weights(), scales


def test_a_nan_on_one_rank_makes_all_ranks_skip_the_step(pool):
    found = pool.run(2, scaled)
    assert not any(isinstance(x, Error) for x in found), found
    assert found[0][1] == found[1][1] == [2.0**10, 2.0**10, 2.0**9, 2.0**9]
    run = Run(False, "sgd")
    for step, x in enumerate(batches()[:4]):
        if step != 2:
            run.forward(x).backward()
            run.step()
    check([weights for weights, _ in found], run.weights())


def recomputed(group, reentrant):
    run, rank = Run(False, "sgd", group, averaged(group, "ddp")), dist.get_rank(group)
    for shares in ([5, 3], [8, 0]):
        for x in batches()[:2]:
            z = run.net(own_part(x, shares, rank))[0]
            loss = checkpoint(
                lambda z: tk.nt_xent(*z, temperature=run.tau, group=group, backend="reference"),
                z,
                use_reentrant=reentrant,
            )
            loss.backward()
            run.step()
    return run.weights()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_weights_of_one_process(reentrant, pool):
    run = Run(False, "sgd")
    for x in 2 * batches()[:2]:
        run.forward(x).backward()
        run.step()
    check(pool.run(2, recomputed, reentrant), run.weights())


class WholeBatchNorm(nn.Module):
    """Batch normalisation over all ranks. It stands in for SyncBatchNorm, which does not run on the CPU."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, x):
        n, total, squares = torch.tensor(float(len(x)), dtype=x.dtype), x.sum(0), (x * x).sum(0)
        if self.group is not None:
            sums = AllReduce.apply(torch.cat([n[None], total, squares]), self.group)
            n, total, squares = sums[0], sums[1 : 1 + x.shape[1]], sums[1 + x.shape[1] :]
        mean = total / n
        return (x - mean) / (squares / n - mean * mean + 1e-3).sqrt()


class AllReduce(torch.autograd.Function):
    """A sum over the ranks whose gradient is the sum of those of all ranks, as SyncBatchNorm's is."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        dist.all_reduce(g, group=ctx.group)
        return g, None


def normalised(group, shares):
    """The averaged gradients of a network with batch normalisation over all ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), WholeBatchNorm(group), nn.Linear(7, 4)).double()
    x = batches()[0]
    if group is not None:
        net = DistributedDataParallel(net, process_group=group)
        x = own_part(x, shares, dist.get_rank(group))
    z = net(x.flatten(0, 1)).unflatten(0, (2, -1))
    tk.nt_xent(*z, temperature=0.3, group=group, backend="reference").backward()
    return [p.grad.numpy() for p in net.parameters()]


def test_batch_norm_over_all_ranks_gives_the_gradients_of_one_process(pool):
    check(pool.run(3, normalised, [4, 1, 3]), normalised(None, None))


def with_a_loss_of_its_own(group):
    """Trains a step with another loss of this rank's rows, which DDP averages over the ranks as usual."""
    run, rank = Run(False, "sgd", group, averaged(group, "ddp")), dist.get_rank(group)
    x = own_part(batches()[0], [4, 4], rank)
    z, _ = run.net(x)
    (tk.nt_xent(*z, temperature=run.tau, group=group, backend="reference") + z.square().mean()).backward()
    run.step()
    return run.weights()


def test_another_loss_of_each_rank_is_averaged_over_the_ranks(pool):
    run = Run(False, "sgd")
    z, _ = run.net(batches()[0])
    (tk.nt_xent(*z, temperature=run.tau, backend="reference") + z.square().mean()).backward()
    run.step()
    check(pool.run(2, with_a_loss_of_its_own), run.weights())


def errors_of_transforms(group):
    """The errors of a second derivative, of vmap and of forward mode."""
    a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = tk.NTXentLoss(group=group, backend="reference")
    (slope,) = torch.autograd.grad(loss(a, a * 2), a, create_graph=True)
    found = []
    for call in (
        lambda: slope.sum().backward(),
        lambda: torch.func.vmap(lambda x: loss(x, x, shares=[3, 3]))(a.detach()[None]),
        lambda: torch.func.jvp(lambda x: loss(x, x, shares=[3, 3]), (a.detach(),), (a.detach(),)),
    ):
        try:
            call()
            found.append("no error")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_second_derivatives_vmap_and_forward_mode_are_errors(pool):
    for second, vmap, forward in pool.run(2, errors_of_transforms):
        assert "differentiate twice" in second
        assert "vmap" in vmap and "Error" in vmap
        assert "jvp" in forward or "forward" in forward


# ---- the page's loops

PAGE = Path(__file__).resolve().parents[1] / "docs" / "processes.md"
BLOCKS = dict(
    re.findall(r"^#+ ([^\n]+)\n(?:(?!^#)[^\n]*\n)*?```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)
FIRST = BLOCKS.pop("Losses over several processes")
SAME = """
weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in (*net.parameters(), *loss.parameters())]
flat = torch.cat([p.detach().flatten() for p in weights])
together = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
dist.all_gather(together, flat)
assert len(together) == 2 and torch.equal(*together) and flat.isfinite().all() and loss.temperature != 0.1
print("the same", flush=True)
dist.barrier()
__import__("os")._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way
"""


@pytest.mark.parametrize(
    "name",
    [name if name == "DistributedDataParallel" else pytest.param(name, marks=pytest.mark.full) for name in BLOCKS],
)
def test_the_training_loops_of_the_page_give_equal_weights_on_all_ranks(name, tmp_path):
    for library in ("accelerate", "lightning"):
        if f"import {library}" in BLOCKS[name] or f"from {library}" in BLOCKS[name]:
            pytest.importorskip(library)
    script = tmp_path / "train.py"
    script.write_text(FIRST + BLOCKS[name] + SAME)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.count("the same") == 2, done.stdout + done.stderr


def test_the_page_has_exactly_the_training_loops_that_are_run():
    assert list(BLOCKS) == ["DistributedDataParallel", "FSDP2", "Accelerate", "Lightning", "By hand"]
