"""Losses over several processes, on gloo: the same value on every rank, the gradient of a single process."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import tclr_kernels as tk

from . import oracle
from .ranks import Error, Pool

LABELS = torch.tensor([0, 1, 0, 2, -1, 1, -1, 3, 0, 2, 5, 1, 1])


@pytest.fixture(scope="session")
def pool():
    with Pool(4) as pool:
        yield pool


class Loss(NamedTuple):
    """call: from the temperature and the tensors; shapes: of the tensors for N rows; spread: their dimensions of rows."""

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
    """This rank's part of input k; of negatives, 12 in all, its share is 4 a rank of 3, and so on."""
    P = len(shares)
    return part(x, shares if k < 2 or loss.rows[k] != -2 else [12 // P] * P, rank, loss.rows[k])


def labels_of(loss, N, own=None):
    if not loss.labelled:
        return {}
    return dict(labels=LABELS[:N] if own is None else own)


def on_ranks(group, name, shares, reduction, known, upstream):
    """One rank's loss and gradients. upstream: of rank r, 1 + r times the entries"""
    loss, rank, N = LOSSES[name], dist.get_rank(group), sum(shares)
    whole = loss.inputs(N)
    own = [split(x, loss, k, shares, rank).clone().requires_grad_() for k, x in enumerate(whole)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    settings = labels_of(loss, N, part(LABELS[:N], shares, rank, -1))
    out = loss.call(
        *own,
        temperature=tau,
        reduction=reduction,
        group=group,
        shares=shares if known else None,
        backend="reference",
        **settings,
    )
    weights = upstream(out, rank, shares) if upstream else (rank + 1) * torch.ones_like(out)
    grads = torch.autograd.grad((out * weights).sum(), [*own, tau])
    return out.detach().numpy(), [g.numpy() for g in grads]


def check(found):
    assert not any(isinstance(x, Error) for x in found), found
    return [(torch.from_numpy(out), [torch.from_numpy(g) for g in grads]) for out, grads in found]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("P, shares", [(P, shares) for P in SHARES for shares in SHARES[P]], ids=str)
def test_value_and_gradient_are_those_of_one_process(P, shares, name, pool):
    known = name in ("nt_xent", "tclr", "moco")
    found = check(pool.run(P, on_ranks, name, shares, "mean", known, None))
    loss, N = LOSSES[name], sum(shares)
    whole = [x.requires_grad_() for x in loss.inputs(N)]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    settings = labels_of(loss, N)
    out = loss.call(*whole, temperature=tau, reduction="mean", backend="reference", **settings)
    U = P * (P + 1) / 2
    wanted = torch.autograd.grad(U * out.sum(), [*whole, tau])
    for rank, (value, grads) in enumerate(found):
        assert torch.equal(value, found[0][0])
        assert oracle.error(value, out.detach()) <= 1e-12 * max(1, out.abs().max().item())
        for k, (g, w) in enumerate(zip(grads[:-1], wanted[:-1], strict=True)):
            w = split(w, loss, k, shares, rank)
            assert g.shape == w.shape
            assert g.numel() == 0 or oracle.error(g, w) <= 1e-12 * max(1, wanted[k].abs().max().item())
        assert grads[-1].item() == pytest.approx(wanted[-1].item() / P, rel=1e-10, abs=1e-12)
