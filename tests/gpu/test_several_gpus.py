"""Losses over several processes with a GPU each, which communicate by NCCL."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tclr_kernels as tk

from .. import oracle
from ..ranks import Error, Pool

COUNT = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(
    COUNT < 2 or not dist.is_nccl_available(), reason=f"NCCL over several processes needs two GPUs, found {COUNT}"
)
BACKENDS = ["native", "triton", "reference"]


@pytest.fixture(scope="module")
def gpus():
    with Pool(min(COUNT, 8), "nccl") as pool:
        yield pool


@pytest.fixture(params=[2, 4, 8])
def P(request):
    if request.param > COUNT:
        pytest.skip(f"needs {request.param} GPUs, found {COUNT}")
    return request.param


def shares_of(P, equal):
    return [96] * P if equal else [64 * (rank % 3) + 5 for rank in range(P)]


def own_rows(group, shares, dtype=torch.float32):
    rank, N = dist.get_rank(group), sum(shares)
    rows = oracle.correlated([(N, 64), (N, 64)], 0.5, 0)
    return [x.narrow(0, sum(shares[:rank]), shares[rank]).to("cuda", dtype).requires_grad_() for x in rows]


def check(found):
    assert not any(isinstance(x, Error) for x in found), found
    return found


def value_and_gradient(group, loss, backend, equal, known, dtype):
    shares = shares_of(dist.get_world_size(group), equal)
    own, tau = own_rows(group, shares, dtype), torch.tensor(0.2, requires_grad=True)  # the loss moves tau to the GPU
    given = dict(group=group, shares=shares if known else None, backend=backend)
    out = getattr(tk, loss)(*own, temperature=tau, **given)
    grads = torch.autograd.grad(out, [*own, tau])
    return out.item(), [g.double().cpu().numpy() for g in grads]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["nt_xent", "clip_loss"])
def test_value_and_gradient_are_those_of_one_process(P, loss, backend, dtype, equal, known, gpus):
    found = check(gpus.run(P, value_and_gradient, loss, backend, equal, known, dtype))
    shares = shares_of(P, equal)
    whole = [x.to(dtype).double().requires_grad_() for x in oracle.correlated([(sum(shares), 64)] * 2, 0.5, 0)]
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    out = getattr(tk, loss)(*whole, temperature=tau, backend="reference")
    *wanted, of_tau = torch.autograd.grad(P * out, [*whole, tau])
    eps = 20 * torch.finfo(dtype).eps
    for rank, (value, grads) in enumerate(found):
        assert value == found[0][0] and value == pytest.approx(out.item(), rel=1e-4)
        for g, w in zip(grads[:-1], wanted, strict=True):
            mine = w.narrow(0, sum(shares[:rank]), shares[rank])
            assert (torch.from_numpy(g) - mine).abs().max() <= eps * w.abs().max()
        assert grads[-1] == pytest.approx(of_tau.item() / P, rel=1e-3)


def trained(group):
    """The weights of a network with SyncBatchNorm after three steps with different shares."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)).cuda()
    net = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net, group), process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        shares = shares_of(dist.get_world_size(group), step % 2 == 0)
        z = net(torch.cat(own_rows(group, shares)).detach())
        tk.nt_xent(*z.chunk(2), temperature=0.2, group=group).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().double().cpu().numpy() for p in net.parameters()]


def one_process(P):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        rows = oracle.correlated([(sum(shares_of(P, step % 2 == 0)), 64)] * 2, 0.5, 0)
        z = net(torch.cat(rows).float().cuda())
        tk.nt_xent(*z.chunk(2), temperature=0.2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().double().cpu().numpy() for p in net.parameters()]


def test_a_network_with_synchronised_batch_norm_gets_the_weights_of_one_process(P, gpus):
    for weights in check(gpus.run(P, trained)):
        for x, y in zip(weights, one_process(P), strict=True):
            assert abs(x - y).max() <= 1e-3 * max(1, abs(y).max())


def captured(group, backend):
    """Whether a captured step replays the same bits 100 times, and the error of a capture without shares."""
    shares = shares_of(dist.get_world_size(group), False)
    own = own_rows(group, shares)

    def step():
        out = tk.nt_xent(*own, group=group, shares=shares, backend=backend)
        return out, *torch.autograd.grad(out, own)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wanted = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    message = ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            tk.nt_xent(*own, group=group, backend=backend)
        except RuntimeError as error:
            message = str(error)
    return all(map(torch.equal, found, wanted)), message


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_replays_its_bits_and_needs_shares(backend, gpus):
    for same, message in check(gpus.run(len(gpus.pipes), captured, backend)):
        assert same and "shares: found None while a CUDA graph is captured" in message


def without_reads(group, backend):
    own, shares = own_rows(group, shares_of(2, True)), shares_of(2, True)
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            tk.nt_xent(*own, group=group, shares=shares, backend=backend).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_on_the_host_with_shares(backend, gpus):
    check(gpus.run(2, without_reads, backend))


def compiled(group):
    shares = shares_of(2, False)
    own = own_rows(group, shares)
    call = torch.compile(lambda a, b: tk.nt_xent(a, b, group=group, shares=shares), fullgraph=True)
    return (call(*own) - tk.nt_xent(*own, group=group, shares=shares)).abs().item()


def test_the_compiled_loss_agrees_without_a_graph_break(gpus):
    assert all(x < 1e-5 for x in check(gpus.run(2, compiled, limit=300)))


def faulty(group):
    rank = dist.get_rank(group)
    own = [x.double() if rank else x for x in own_rows(group, [8] * dist.get_world_size(group))]
    try:
        tk.nt_xent(*own, group=group)
    except ValueError as error:
        tk.nt_xent(*own_rows(group, [8] * dist.get_world_size(group)), group=group).item()
        return str(error)


def test_an_error_of_one_rank_is_raised_on_all(gpus):
    assert all("ranks differ in dtype" in x for x in check(gpus.run(len(gpus.pipes), faulty)))
