"""The providers: every way to compute a case's loss that is compared here, behind one adapter each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tclr_kernels as tk

from .cases import TAU


class Provider(NamedTuple):
    """A way to compute some of the losses."""

    label: str
    backend: str
    steps: dict[str, Callable]  # loss -> a function from the inputs to a step, which returns the loss and its gradients
    largest: int = 8192  # rows; beyond, its matrices do not fit an ordinary machine
    a_loss: bool = True  # else a floor: part of the work, whose result is not compared


def autograd(function):
    """The step of a loss function: its value and the gradients for all inputs."""

    def step_for(inputs):
        def step():
            loss = function(*inputs)
            return loss.detach(), torch.autograd.grad(loss, inputs)

        return step

    return step_for


def ours(backend):
    """This library by one of its backends."""
    return {
        "nt_xent": autograd(lambda a, b: tk.nt_xent(a, b, temperature=TAU, backend=backend)),
        "tclr_release": autograd(
            lambda g, s, x: tk.tclr(g, s, x, temperature=TAU, form="release", backend=backend).total
        ),
    }


def dense(a, b):
    """NT-Xent in the fastest plain PyTorch found: scaled once as rows, masked in place, one fused cross-entropy."""
    z = F.normalize(torch.cat([a, b])) * TAU**-0.5
    S = torch.mm(z, z.T).fill_diagonal_(-torch.inf)
    N = len(a)
    partner = torch.cat([torch.arange(N, 2 * N), torch.arange(N)])
    return F.cross_entropy(S, partner)


def masked(a, b):
    """NT-Xent as it is usually written: positives and negatives picked by boolean masks, and concatenated again."""
    z = torch.cat([F.normalize(a), F.normalize(b)])
    S = z @ z.T
    M = len(S)
    labels = torch.arange(len(a)).repeat(2)
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(M, dtype=torch.bool)
    same = same[~itself].view(M, -1)
    S = S[~itself].view(M, -1)
    logits = torch.cat([S[same].view(M, 1), S[~same].view(M, -1)], dim=1) / TAU
    return F.cross_entropy(logits, torch.zeros(M, dtype=torch.long))


def compiled(inputs):
    """`dense` through torch.compile, for fixed sizes."""
    torch.compiler.reset()  # a case must not pass the guards of those before it
    return autograd(torch.compile(dense, dynamic=False))(inputs)


def products(inputs):
    """The three dense matrix products of forward and backward alone, into memory that is already there."""
    z = torch.cat([x.detach() for x in inputs])
    S, dz = z.new_empty(len(z), len(z)), torch.empty_like(z)

    def step():
        torch.mm(z, z.T, out=S)
        torch.mm(S, z, out=dz)
        torch.mm(S.T, z, out=dz)

    return step


def pairwise(zi, zj):
    """NT-Xent of one pair of views in the way of TCLR's release: a mask built on the host, a sum divided by 2B."""
    B = len(zi)
    z = torch.cat([zj, zi])
    S = torch.tensordot(z.unsqueeze(1), z.T.unsqueeze(0), dims=2)
    negative = ~(torch.eye(2 * B) + torch.eye(2 * B).roll(B, 0)).bool()
    positives = torch.cat([torch.diag(S, B), torch.diag(S, -B)]).view(2 * B, 1)
    logits = torch.cat([positives, S[negative].view(2 * B, -1)], dim=1) / TAU
    return F.cross_entropy(logits, torch.zeros(2 * B).long(), reduction="sum") / (2 * B)


def slices_against_clips(s, x):
    """GL of one pair of views in the way of TCLR's release: both directions in one batch of T x T problems."""
    B, T, _ = s.shape
    S = torch.bmm(s, x.permute(0, 2, 1))
    logits = torch.cat([S, S.permute(0, 2, 1)]).reshape(-1, T) / TAU
    return F.cross_entropy(logits, torch.tensor(list(range(T)) * (2 * B)), reduction="sum") / (2 * B)


def release(g, s, x):
    """The whole objective in the structure of TCLR's release: a call a pair of sets, a video, a pair of views."""
    g, s, x = (F.normalize(z, dim=-1) for z in (g, s, x))
    V, B, T, _ = x.shape
    sets = [x[v, :, t] for v in range(V) for t in range(T)]
    ic_global = pairwise(g[0], g[1])
    ic_local = sum(pairwise(a, c) for i, a in enumerate(sets) for j, c in enumerate(sets) if i != j) / V**2
    ll = sum(pairwise(x[0, i], x[1, i]) for i in range(B))
    gl = sum(slices_against_clips(s[v], x[w]) for v in range(V) for w in range(V))
    return ic_global + ic_local + ll + gl


PROVIDERS = {
    "native": Provider("tclr-kernels", "native", ours("native"), largest=1 << 30),
    "reference": Provider("tclr-kernels, reference", "reference", ours("reference")),
    "dense": Provider("PyTorch, fastest form", "eager", dict(nt_xent=autograd(dense))),
    "masked": Provider("PyTorch, as usually written", "eager", dict(nt_xent=autograd(masked))),
    "compile": Provider("torch.compile of the fastest form", "inductor", dict(nt_xent=compiled)),
    "products": Provider("its three matrix products alone", "gemm", dict(nt_xent=products), a_loss=False),
    "release": Provider("PyTorch, structure of TCLR's release", "eager", dict(tclr_release=autograd(release))),
}


def serving(case):
    """The providers of a case, by name."""
    return {name: p for name, p in PROVIDERS.items() if case.loss in p.steps and case.rows <= p.largest}
