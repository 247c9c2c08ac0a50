"""Losses over several processes, on gloo: the same value on every rank, the gradient of a single process."""

import pytest
import torch

from tclr_kernels import distributed, general

from . import oracle
from .ranks import Error, Pool


@pytest.fixture(scope="session")
def pool():
    with Pool(4) as pool:
        yield pool


def shares_of(P):
    return {2: [[3, 3], [5, 1], [4, 0]], 3: [[2, 2, 2], [5, 1, 3], [0, 4, 2]], 4: [[7, 2, 1, 3]]}[P]


CASES = [(P, shares) for P in (2, 3, 4) for shares in shares_of(P)]


def part(x, shares, rank, dim=-2):
    return x.narrow(dim, sum(shares[:rank]), shares[rank])


def blocks(group, shares, backend, keys):
    process = distributed.resolve(group, None)
    sets = oracle.correlated([(2, sum(shares), 6)] * 2, 0.5, 0)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    own = [part(x, shares, process.rank).clone().requires_grad_() for x in sets]
    facts = dict(rows=shares[process.rank], negatives=0, width=6, sets=2, dtype=0, settings=0)
    process.agree(own[0], **facts, **{"leading dimensions": 2, "inputs that need a gradient": 7})
    columns = [process.gather(x.detach(), 1, process.shares) for x in own]
    own_keys = None if keys is None else part(keys, shares, process.rank, -1)
    settings = general.Settings(backend, True, False, process.first)
    shared = distributed.MeanGradient.apply(process, tau)
    outputs = distributed.Blocks.apply(process, settings, shared, own_keys, keys, 2, *own, *columns)
    total = loss_of(outputs)
    (total,), _ = distributed.Total.apply(process, total[None], total.new_zeros(0))
    grads = torch.autograd.grad(total * (process.rank + 1), [*own, tau])
    return total.item(), [g.numpy() for g in grads]


def loss_of(outputs):
    total = general.terms(*outputs[:2], False).sum()
    for k, x in enumerate(outputs[2:4]):
        total = total + (x.masked_fill(~x.isfinite(), 0) * oracle.some_gradient(x.shape, k)).sum()
    return total


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("P, shares", CASES)
def test_the_operation_is_that_of_one_process(P, shares, labelled, pool):
    keys = (torch.arange(sum(shares)) // 2).expand(2, -1) if labelled else None
    found = pool.run(P, blocks, shares, "reference", keys)
    assert not any(isinstance(x, Error) for x in found), found
    sets = [x.requires_grad_() for x in oracle.correlated([(2, sum(shares), 6)] * 2, 0.5, 0)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    settings = general.Settings("reference", True, False, 0)
    total = loss_of(general.rectangle(settings, tau, (keys, keys), [], sets))
    upstream = P * (P + 1) / 2
    wanted = torch.autograd.grad(total * upstream, [*sets, tau])
    for rank, (value, grads) in enumerate(found):
        assert value == pytest.approx(total.item(), rel=1e-12)
        assert value == found[0][0]
        for g, w in zip(grads[:2], wanted, strict=False):
            g = torch.from_numpy(g)
            assert oracle.error(g, part(w, shares, rank)) <= 1e-12 * w.abs().max() if g.numel() else True
        assert grads[2] == pytest.approx(wanted[2].item() / P, rel=1e-11)
