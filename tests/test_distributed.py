"""Losses over several processes, by gloo, have one value on all ranks and the gradient of a single process."""

import copy
import functools
import pickle
import timeit
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._dynamo import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode

import tclr_kernels as tk
from tclr_kernels import distributed

from . import oracle
from .conftest import INTERPRETED, usable
from .ranks import Error

LABELS = torch.tensor([0, 1, 0, 2, -1, 1, -1, 3, 0, 2, 5, 1, 1])


class Loss(NamedTuple):
    """call(*tensors, **settings) is the loss, shapes(N) are the tensors' shapes. rows: their dimension of rows."""

    call: object
    shapes: object
    rows: tuple = (-2, -2)
    labelled: bool = False

    def inputs(self, N, normalize=True):
        return oracle.correlated(self.shapes(N), 0.5, 0)


def two(N):
    return [(N, 6), (N, 6)]


def grouped(N):
    return [(2, 3, N, 6), (2, 3, N, 6)]


def videos(N):
    return [(N, 3, 5), (N, 3, 5)]


def clips(N):
    return [(2, N, 5), (2, N, 3, 5), (2, N, 3, 5)]


def with_negatives(K, *shape):
    return lambda N: [*two(N), (*shape, K, 6)]


def negatives(function, **settings):
    return lambda a, b, n, **more: function(a, b, negatives=n, **settings, **more)


def terms(*z, **settings):
    settings.pop("reduction", None)
    return torch.stack(list(tk.tclr(*z, **settings)))


LOSSES = {
    "nt_xent": Loss(tk.nt_xent, two),
    "nt_xent one way": Loss(functools.partial(tk.nt_xent, symmetric=False), grouped),
    "nt_xent labels decoupled": Loss(functools.partial(tk.nt_xent, decoupled=True), two, labelled=True),
    "nt_xent negatives": Loss(negatives(tk.nt_xent), with_negatives(12), (-2, -2, -2)),
    "clip": Loss(tk.clip_loss, two),
    "clip labels": Loss(tk.clip_loss, grouped, labelled=True),
    "clip negatives": Loss(
        lambda a, b, n, **more: tk.clip_loss(a, b, negatives=(None, n), **more), with_negatives(12), (-2, -2, -2)
    ),
    "info_nce": Loss(tk.info_nce, two),
    "info_nce negatives": Loss(negatives(tk.info_nce), with_negatives(12), (-2, -2, -2)),
    "moco": Loss(negatives(tk.info_nce, in_batch=False), with_negatives(12), (-2, -2, -2)),
    "views": Loss(tk.instance_contrastive, lambda N: [(3, N, 6)], (-2,)),
    "views joint": Loss(functools.partial(tk.instance_contrastive, softmax="joint"), lambda N: [(3, N, 6)], (-2,)),
    "sup_con": Loss(tk.sup_con, lambda N: [(N, 6)], (-2,), labelled=True),
    "local_local": Loss(tk.local_local, videos, (0, 0)),
    "global_local": Loss(tk.global_local, videos, (0, 0)),
    "tclr": Loss(terms, clips, (1, 1, 1)),
    "tclr release": Loss(functools.partial(terms, form="release"), clips, (1, 1, 1)),
    "tclr labels": Loss(functools.partial(terms, form="release"), clips, (1, 1, 1), labelled=True),
}
SHARES = {2: [[3, 3], [5, 1], [4, 0]], 3: [[2, 2, 2], [5, 1, 3], [0, 4, 2]], 4: [[7, 2, 1, 3], [1, 0, 0, 0]]}


def part(x, shares, rank, dim):
    return x.narrow(dim, sum(shares[:rank]), shares[rank])


def split(x, loss, k, shares, rank):
    """This rank's part of input k. The 12 negatives are divided equally, for example 4 for each of 3 ranks."""
    P = len(shares)
    return part(x, shares if k < 2 or loss.rows[k] != -2 else [12 // P] * P, rank, loss.rows[k])


def labels_of(loss, N, own=None):
    if not loss.labelled:
        return {}
    return dict(labels=LABELS[:N] if own is None else own)


def own_of(terms, N, shares, rank):
    """The terms of a rank's rows, from all terms [..., N] or [..., 2N] (those of a, then those of b)."""
    return part(terms.unflatten(-1, (-1, N)), shares, rank, -1).flatten(-2)


def weights_like(terms, seed=3):
    return torch.randn(terms.shape, generator=torch.Generator().manual_seed(seed), dtype=terms.dtype)


def on_ranks(group, name, shares, settings, known, shape=None, backend="reference"):
    """One rank's loss and gradients. shape: the shape of the terms of all ranks, with reduction="none"."""
    loss, rank, N = LOSSES[name], dist.get_rank(group), sum(shares)
    whole = loss.inputs(N)
    own = [split(x, loss, k, shares, rank).clone().requires_grad_() for k, x in enumerate(whole)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    labels = labels_of(loss, N, part(LABELS[:N], shares, rank, -1))
    more = dict(temperature=tau, group=group, shares=shares if known else None, backend=backend)
    out = loss.call(*own, **more, **labels, **settings)
    if shape is None:
        weights = (rank + 1) * torch.ones_like(out)
    else:
        weights = own_of(weights_like(torch.empty(shape, dtype=torch.float64)), N, shares, rank)
    grads = torch.autograd.grad((out * weights).sum(), [*own, tau])
    return out.detach().numpy(), [g.numpy() for g in grads]


def check(found):
    assert not any(isinstance(x, Error) for x in found), found
    return found


def tensors(found):
    return [(torch.from_numpy(out), [torch.from_numpy(g) for g in grads]) for out, grads in check(found)]


def by_one_process(name, N, **settings):
    """The inputs and the temperature, and the loss with its graph."""
    loss = LOSSES[name]
    whole = [x.requires_grad_() for x in loss.inputs(N)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    out = loss.call(*whole, temperature=tau, backend="reference", **labels_of(loss, N), **settings)
    return [*whole, tau], out


def compare(name, shares, found, wanted, bound=1e-12):
    """Compares the ranks' gradients with those of one process. The temperature's is a mean over the ranks."""
    for rank, (_, grads) in enumerate(found):
        for k, (g, w) in enumerate(zip(grads[:-1], wanted[:-1], strict=True)):
            w = split(w, LOSSES[name], k, shares, rank)
            assert g.shape == w.shape
            assert g.numel() == 0 or oracle.error(g, w) <= bound * max(1, wanted[k].abs().max().item())
        assert grads[-1].item() == pytest.approx(wanted[-1].item() / len(shares), rel=1e-10, abs=1e-12)


ALL = [(P, shares) for P in SHARES for shares in SHARES[P]]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("P, shares", ALL, ids=str)
def test_value_and_gradient_are_those_of_one_process(P, shares, name, pool):
    known = name in ("nt_xent", "tclr", "moco")
    found = tensors(pool.run(P, on_ranks, name, shares, {}, known))
    inputs, out = by_one_process(name, sum(shares))
    for value, _ in found:
        assert torch.equal(value, found[0][0])
        assert oracle.error(value, out.detach()) <= 1e-12 * max(1, out.abs().max().item())
    upstream = P * (P + 1) / 2  # rank r has the upstream gradient r + 1
    compare(name, shares, found, torch.autograd.grad(upstream * out.sum(), inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_every_backend_gives_the_value_and_gradient_of_one_process(name, float64, pool):
    if float64 == "reference":
        return
    cases = [(3, [5, 1, 3])] if INTERPRETED else [(2, [3, 3]), (3, [5, 1, 3]), (4, [1, 0, 0, 0])]
    for P, shares in cases:
        found = tensors(pool.run(P, on_ranks, name, shares, {}, True, None, float64, limit=300))
        inputs, out = by_one_process(name, sum(shares))
        for value, _ in found:
            assert torch.equal(value, found[0][0])
            assert oracle.error(value, out.detach()) <= 1e-11 * max(1, out.abs().max().item())
        compare(name, shares, found, torch.autograd.grad(P * (P + 1) / 2 * out.sum(), inputs), 1e-11)


REDUCED = [name for name in LOSSES if not name.startswith("tclr")]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", REDUCED)
def test_each_rank_gets_its_own_terms(name, normalize, pool):
    """The upstream gradients are random, and each rank gets those of its own terms."""
    settings = dict(reduction="none", normalize=normalize)
    for P, shares in ((3, [5, 1, 3]), (2, [4, 0])):
        inputs, out = by_one_process(name, sum(shares), **settings)
        found = tensors(pool.run(P, on_ranks, name, shares, settings, P == 2, tuple(out.shape)))
        wanted = torch.autograd.grad((out * weights_like(out)).sum(), inputs)
        for rank, (value, _) in enumerate(found):
            torch.testing.assert_close(value, own_of(out, sum(shares), shares, rank).detach(), rtol=1e-12, atol=1e-12)
        compare(name, shares, found, wanted)


@pytest.mark.parametrize("name", REDUCED)
def test_reduction_sum_adds_the_terms_of_all_ranks(name, pool):
    shares, settings = [2, 2, 2], dict(reduction="sum", normalize=False)
    found = tensors(pool.run(3, on_ranks, name, shares, settings, False))
    inputs, out = by_one_process(name, 6, **settings)
    for value, _ in found:
        torch.testing.assert_close(value, out.detach(), rtol=1e-12, atol=1e-12)
    compare(name, shares, found, torch.autograd.grad(6 * out, inputs))


def without_graph(group):
    """The values of losses under no_grad and in inference mode."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            a, b = (x[2 * dist.get_rank(group) :][:2] for x in oracle.correlated([(6, 5), (6, 5)], 0.5, 0))
            for shares in (None, [2, 2, 2]):
                settings = dict(group=group, shares=shares, backend="reference")
                terms = tk.clip_loss(a, b, reduction="none", **settings).tolist()
                found.append([tk.nt_xent(a, b, negatives=b, **settings).item(), *terms])
    return found


def test_values_without_gradients_are_those_of_one_process(pool):
    a, b = oracle.correlated([(6, 5), (6, 5)], 0.5, 0)
    wanted = tk.nt_xent(a, b, negatives=b, backend="reference").item()
    terms = tk.clip_loss(a, b, reduction="none", backend="reference")
    for rank, found in enumerate(check(pool.run(3, without_graph))):
        own = own_of(terms, 6, [2, 2, 2], rank).tolist()
        assert all(values == pytest.approx([wanted, *own], rel=1e-12) for values in found)


# ---- which group


def with_group(group, how):
    """The loss and gradients of this rank's 3 rows, with a group and without one."""
    a, b = (x.requires_grad_() for x in oracle.correlated([(3, 6), (3, 6)], 0.5, dist.get_rank(group)))
    group = {"group": group, "world": "world", "mesh": None}[how] or dist.DeviceMesh.from_group(group, "cpu")
    values = [tk.nt_xent(a, b, group=g, backend="reference") for g in (group, None)]
    return [[x.detach().numpy() for x in (value, *torch.autograd.grad(value, [a, b]))] for value in values]


@pytest.mark.parametrize("how", ["group", "mesh"])
def test_a_group_of_one_process_gives_the_loss_without_a_group(how, pool):
    (found,) = check(pool.run(1, with_group, how))
    assert all((x == y).all() for x, y in zip(*found, strict=True))


def test_a_mesh_and_world_give_the_loss_of_the_process_group(pool):
    world, group, mesh = (check(pool.run(4, with_group, how)) for how in ("world", "group", "mesh"))
    for rank in range(4):
        assert all(
            (x == y).all() and (x == z).all()
            for x, y, z in zip(world[rank][0], group[rank][0], mesh[rank][0], strict=True)
        )
        assert world[rank][0][0] == world[0][0][0] != world[rank][1][0]


def test_world_is_this_process_alone_without_an_initialised_group():
    a, b = oracle.correlated([(3, 6), (3, 6)], 0.5, 0)
    loss = tk.NTXentLoss(group="world", backend="reference")
    for other in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(a, b), tk.nt_xent(a, b, backend="reference")) and "group=world" in repr(other)
    assert torch.equal(loss(a, b, shares=[3]), loss(a, b))


def subgroups(group):
    """The loss in one of two pairs of ranks, from a mesh of two dimensions, and a weight's gradient over all ranks."""
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
    w = torch.eye(6, dtype=torch.float64).requires_grad_()
    a, b = oracle.correlated([(12, 6), (12, 6)], 0.5, 0)
    a, b = (x[3 * rank : 3 * rank + 3] @ w for x in (a, b))
    loss = tk.NTXentLoss(0.2, group=mesh["data"], backend="reference")
    out = copy.deepcopy(loss)(a, b)
    (g,) = torch.autograd.grad(out, w)
    dist.all_reduce(g)
    try:
        tk.nt_xent(a, b, group=mesh)
    except ValueError as error:
        return out.item(), (g / 4).numpy(), str(error)


def test_subgroups_compare_only_their_own_rows(pool):
    found = check(pool.run(4, subgroups))
    w = torch.eye(6, dtype=torch.float64).requires_grad_()
    a, b = oracle.correlated([(12, 6), (12, 6)], 0.5, 0)
    halves = [tk.nt_xent(*(x[k : k + 6] @ w for x in (a, b)), temperature=0.2, backend="reference") for k in (0, 6)]
    (wanted,) = torch.autograd.grad(sum(halves) / 2, w)
    for rank, (value, g, message) in enumerate(found):
        assert value == pytest.approx(halves[rank // 2].item(), rel=1e-12)
        assert oracle.error(torch.from_numpy(g), wanted) < 1e-12
        assert "group: found a DeviceMesh of 2 dimensions" in message


def outside(group):
    pair = dist.new_group([0, 1])  # all ranks must call this
    mesh = dist.DeviceMesh("cpu", [0, 1])
    messages = []
    a = torch.randn(3, 4)
    loss = tk.NTXentLoss(group=pair, backend="reference")
    for call in (lambda: loss(a, a), lambda: tk.nt_xent(a, a, group=mesh, backend="reference")):
        try:
            messages.append(call().item())
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_a_rank_outside_of_the_group_gets_an_error(pool):
    inside, _, out, _ = check(pool.run(4, outside))
    assert all(isinstance(x, float) for x in inside)
    assert all("group: this process is not one of its ranks" in x for x in out)


@pytest.mark.parametrize(
    "group, error, message",
    [
        ("wrold", TypeError, "group: found 'wrold', wanted None, \"world\""),
        ([0, 1], TypeError, "group: found .0, 1., wanted None"),
    ],
)
def test_a_wrong_group_and_shares_without_a_group_are_errors(group, error, message):
    a = torch.randn(3, 4)
    with pytest.raises(error, match=message):
        tk.nt_xent(a, a, group=group)
    with pytest.raises(error, match=message):
        tk.NTXentLoss(group=group)
    with pytest.raises(ValueError, match="shares: found .3. without a group, wanted None"):
        tk.NTXentLoss()(a, a, shares=[3])


def copied(group):
    """Whether a copy of a module with a ProcessGroup gives the same loss."""
    loss = tk.TCLRLoss(temperature=torch.nn.Parameter(torch.tensor(0.2)), group=group, backend="reference")
    other = copy.deepcopy(loss)
    z = [torch.randn(2, 3, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)]
    assert other.temperature is not loss.temperature and other.settings is not loss.settings
    return torch.stack(loss(*z, shares=[3, 3])).equal(torch.stack(other(*z, shares=[3, 3])))


def test_a_copy_of_a_module_shares_its_group(pool):
    assert check(pool.run(2, copied)) == [True, True]


# ---- the queue


def queues(group, shares, known):
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    queue = tk.NegativeQueue(10, 6)
    keys, *ab = oracle.correlated([(2, 7, 6), (7, 6), (7, 6)], 0.5, 0)
    a, b = (part(x, shares, rank, 0) for x in ab)
    settings = dict(group=group, shares=shares if known else None)
    for _ in range(2):
        queue.enqueue(part(keys, shares, rank, 1).float(), **settings)
    values = [
        tk.nt_xent(a, b, negatives=queue, backend="reference", **settings),
        tk.info_nce(a, b, negatives=queue, in_batch=False, backend="reference", **settings),
    ]
    return queue.rows.numpy(), queue.position.item(), [x.item() for x in values]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shares", [[5, 2], [3, 0, 4]], ids=str)
def test_a_queue_stays_the_same_on_every_rank(shares, known, pool):
    found = check(pool.run(len(shares), queues, shares, known))
    torch.manual_seed(0)
    queue = tk.NegativeQueue(10, 6)
    keys, a, b = oracle.correlated([(2, 7, 6), (7, 6), (7, 6)], 0.5, 0)
    for _ in range(2):
        queue.enqueue(keys.float())
    wanted = [
        tk.nt_xent(a, b, negatives=queue, backend="reference").item(),
        tk.info_nce(a, b, negatives=queue, in_batch=False, backend="reference").item(),
    ]
    for rows, position, values in found:
        assert (rows == queue.rows.numpy()).all() and position == queue.position.item()
        assert values == pytest.approx(wanted, rel=1e-12) and values == found[0][2]


# ---- what is sent


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, call, types, arguments=(), settings=None):
        if call.namespace in ("c10d", "_c10d_functional") and "wait" not in call.name():
            self.bytes.append(arguments[0].numel() * arguments[0].element_size())
        return call(*arguments, **(settings or {}))


def counted(group, name, shares, dtype, settings, known):
    """The bytes of each collective in the forward and in the backward."""
    loss, rank, N = LOSSES[name], dist.get_rank(group), sum(shares)
    inputs = [x.to(dtype) for x in loss.inputs(N)]
    own = [split(x, loss, k, shares, rank).clone().requires_grad_() for k, x in enumerate(inputs)]
    tau = torch.tensor(0.3, requires_grad=True)
    labels = labels_of(loss, N, part(LABELS[:N], shares, rank, -1))
    more = dict(group=group, shares=shares if known else None, backend="reference")
    with Sent() as forward:
        out = loss.call(*own, temperature=tau, **more, **labels, **settings)
    with Sent() as backward:
        out.sum().backward()
    with Sent() as alone:
        if shares[rank]:
            loss.call(*own, temperature=tau, backend="reference", **labels, **settings).sum().backward()
    return forward.bytes, backward.bytes, alone.bytes


HEADER = 88
NONE = dict(reduction="none")
D, n, K = 6, 4, 4  # n rows and K negatives on each rank. b, w: the bytes of a number of the inputs and of the terms
TABLE = {  # (name, settings) -> the bytes that a rank sends in forward and backward. G = 6 if there are groups
    ("nt_xent", ()): lambda b, w: ([2 * n * D * b, 16 * 4 * n], [8, 8]),
    ("nt_xent", ("none",)): lambda b, w: ([2 * n * D * b, 16 * 4 * n], [4 * n * w, 8]),
    ("nt_xent one way", ()): lambda b, w: ([6 * 2 * n * D * b, 6 * 16 * 4 * n], [8, 8]),
    ("nt_xent labels decoupled", ()): lambda b, w: ([8 * n, 2 * n * D * b, 40 * 4 * n], [8, 8]),
    ("nt_xent negatives", ()): lambda b, w: ([2 * n * D * b, 16 * 4 * n, K * D * b, 8 * 2 * n], [8, 8]),
    ("clip", ()): lambda b, w: ([2 * n * D * b, 16 * 4 * n], [8, 8]),
    ("clip negatives", ()): lambda b, w: ([2 * n * D * b, 16 * 4 * n, K * D * b, 8 * n], [8, 8]),
    ("moco", ()): lambda b, w: ([n * D * b, K * D * b, 8 * n, 8 * n], [8, 8]),
    ("views", ()): lambda b, w: ([3 * n * D * b, 16 * 9 * n], [8, 8]),
    ("views joint", ("none",)): lambda b, w: ([3 * n * D * b, 16 * 9 * n], [3 * n * w, 8]),
    ("sup_con", ()): lambda b, w: ([8 * n, n * D * b, 40 * n], [8, 8]),
    ("local_local", ()): lambda b, w: ([8], [8, 8]),
    ("global_local", ("none",)): lambda b, w: ([], [8]),
    ("tclr", ()): lambda b, w: ([2 * n * 5 * b, 16 * 4 * n, 4 * 8], [4 * 8, 8]),
    ("tclr release", ()): lambda b, w: (
        [2 * n * 5 * b, 16 * 4 * n, 2 * 3 * n * 5 * b, 16 * 36 * n, 4 * 8],
        [4 * 8, 8],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, reduction", TABLE, ids=str)
def test_collectives_send_as_many_bytes_as_the_page_says(name, reduction, dtype, pool):
    forward, backward = TABLE[name, reduction](dtype.itemsize, max(dtype.itemsize, 4))
    settings = NONE if reduction else {}
    for known, shares in ((False, [4, 4, 4]), (True, [4, 1, 3]), (True, [4, 0, 1])):
        for found in check(pool.run(3, counted, name, shares, dtype, settings, known)):
            assert found == ([HEADER] * (not known) + forward, backward, [])


# ---- bits, dtypes


def some_bits(group, shares, backend, threads=1):
    torch.set_num_threads(threads)
    a, b = (part(x.float(), shares, dist.get_rank(group), 0) for x in oracle.correlated([(300, 40)] * 2, 0.5, 0))
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    runs = []
    for _ in range(3):
        value = tk.nt_xent(a, b, group=group, shares=shares, backend=backend)
        runs.append([x.detach().numpy().tobytes() for x in (value, *torch.autograd.grad(value, [a, b]))])
    torch.set_num_threads(1)
    return runs


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shares", [[150, 150], [100, 101, 99]], ids=str)
def test_results_have_the_same_bits_on_every_rank_and_in_every_run(shares, backend, pool):
    usable(backend)
    found = check(pool.run(len(shares), some_bits, shares, backend))
    assert found == check(pool.run(len(shares), some_bits, shares, backend))
    for runs in found:
        assert runs[0] == runs[1] == runs[2] and runs[0][0] == found[0][0][0]


def test_results_have_the_same_bits_with_any_number_of_threads(pool, native):
    one, two = (check(pool.run(2, some_bits, [150, 150], native, threads)) for threads in (1, 2))
    assert one == two


def narrow(group, name, dtype):
    rank, shares = dist.get_rank(group), [3, 1, 4]
    own = [split(x, LOSSES[name], k, shares, rank).to(dtype) for k, x in enumerate(LOSSES[name].inputs(8))]
    own = [x.clone().requires_grad_() for x in own]
    labels = labels_of(LOSSES[name], 8, part(LABELS[:8], shares, rank, -1))
    out = LOSSES[name].call(*own, temperature=0.3, group=group, backend="reference", **labels)
    grads = torch.autograd.grad(out.sum(), own)
    assert all(g.dtype == dtype for g in grads)
    return out.detach().numpy(), [g.double().numpy() for g in grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "clip negatives", "moco", "sup_con", "tclr release"])
def test_float32_and_half_precision_agree_with_one_process(name, dtype, pool):
    found = tensors(pool.run(3, narrow, name, dtype))
    whole = [x.to(dtype).requires_grad_() for x in LOSSES[name].inputs(8)]
    labels = labels_of(LOSSES[name], 8)
    out = LOSSES[name].call(*whole, temperature=0.3, backend="reference", **labels)
    wanted = torch.autograd.grad(3 * out.sum(), whole)
    assert out.dtype == torch.float32
    eps = 4 * torch.finfo(dtype).eps
    for rank, (value, grads) in enumerate(found):
        torch.testing.assert_close(value, out.detach(), rtol=1e-6, atol=1e-6)
        for k, g in enumerate(grads):
            w = split(wanted[k], LOSSES[name], k, [3, 1, 4], rank).double()
            torch.testing.assert_close(g, w, rtol=eps, atol=eps * wanted[k].abs().max().item())


# ---- torch.compile


def compiled(group, name, shares, known, backend, kernels="reference"):
    """The number of graphs that a compiled loss runs, and its largest difference from eager mode."""
    torch._dynamo.reset()
    loss, rank, N = LOSSES[name], dist.get_rank(group), sum(shares)
    own = [split(x, loss, k, shares, rank).clone().requires_grad_() for k, x in enumerate(loss.inputs(N))]
    inputs = [*own, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    labels = labels_of(loss, N, part(LABELS[:N], shares, rank, -1))

    def call(*z, shares):
        z = [x * 2 for x in z]
        out = loss.call(*z[:-1], temperature=z[-1], group=group, shares=shares, backend=kernels, **labels)
        return 3 * out.sum()

    graphs = []  # the graphs that have run

    def counting(graph, examples):
        run = lookup_backend(backend)(graph, examples)
        return lambda *given: (graphs.append(graph), run(*given))[1]

    given = shares if known else None
    values = []
    for function in (call, torch.compile(call, backend=counting, fullgraph=known)):
        out = function(*inputs, shares=given)
        values.append([out.detach(), *torch.autograd.grad(out, inputs)])
    differences = [(x - y).abs().max().item() if x.numel() else 0.0 for x, y in zip(*values, strict=True)]
    return len(graphs), max(differences)


@pytest.mark.full
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_losses_with_shares_compile_into_one_graph(name, backend, pool):
    for shares in ([3, 3], [4, 1]):
        for graphs, difference in check(pool.run(2, compiled, name, shares, True, backend, limit=300)):
            assert graphs == 1 and difference < 1e-12


@pytest.mark.parametrize(
    "name", ["nt_xent", *(pytest.param(x, marks=pytest.mark.full) for x in LOSSES if x != "nt_xent")]
)
def test_native_losses_with_shares_compile_into_one_graph(name, native, pool):
    for graphs, difference in check(pool.run(2, compiled, name, [4, 1], True, "aot_eager", native, limit=300)):
        assert graphs == 1 and difference < 1e-12


def test_a_loss_without_shares_has_one_graph_break(pool):
    for graphs, difference in check(pool.run(2, compiled, "nt_xent", [4, 1], False, "aot_eager", limit=300)):
        assert graphs == 2 and difference < 1e-12


def over_sizes(group, plans, kernels):
    """The number of graphs of a compiled loss that is called with several shares, and its largest difference."""
    torch._dynamo.reset()
    graphs, differences = set(), []

    def counting(graph, examples):
        run = lookup_backend("aot_eager")(graph, examples)
        return lambda *given: (graphs.add(id(graph)), run(*given))[1]

    def call(a, b, shares):
        return tk.nt_xent(a * 2, b, group=group, shares=shares, backend=kernels)

    compiled = torch.compile(call, backend=counting, fullgraph=True)
    for shares in plans:
        a, b = (x.requires_grad_() for x in oracle.correlated([(shares[dist.get_rank(group)], 6)] * 2, 0.5, 0))
        values = [(out := f(a, b, shares), *torch.autograd.grad(out, [a, b])) for f in (compiled, call)]
        differences += [(x - y).abs().max().item() for x, y in zip(*values, strict=True)]
    return len(graphs), max(differences)


@pytest.mark.full
@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_two_graphs_are_enough_for_all_sizes(kernels, pool):
    """The first graph is for the first sizes only. Sizes of 1, such as one row of padding, would need more graphs."""
    for plans in ([[n, n] for n in (3, 5, 7, 9, 4)], [[6, 2], [9, 4], [12, 3], [8, 5], [9, 6]]):
        for graphs, difference in check(pool.run(2, over_sizes, plans, usable(kernels), limit=300)):
            assert graphs <= 2 and difference < 1e-12


def test_looking_for_a_group_takes_less_than_two_microseconds():
    def plain(a, b, *, temperature=0.1, group=None, shares=None):
        return a

    def seconds(call):
        return min(timeit.repeat(lambda: call(1, 2, temperature=0.2), number=1000, repeat=30)) / 1000

    assert seconds(distributed.collective(plain)) - seconds(plain) < 2e-6
