"""The table of providers: all implementations that the benchmarks compare."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import tclr_kernels as tk

from . import baselines, floors, peers


class Provider(NamedTuple):
    """An implementation of some of the losses.

    losses: {loss: function of the inputs and tau}; for other libraries, a function that makes this dict for a tau, or
    raises an error if the library cannot run.
    floors: {loss: function of the inputs that returns a step}, of lower limits, whose result is not compared.
    """

    label: str
    backend: str
    losses: dict | Callable = {}
    floors: dict = {}
    largest: int = 8192  # the most rows, if all that it holds is one Gram matrix; more do not fit an ordinary machine
    compiled: bool = False

    def serves(self, case):
        known = self.losses if isinstance(self.losses, dict) else PEERS_SERVE[self.losses]
        return case.entries <= self.largest**2 and (
            case.loss in known or (case.loss in self.floors and _is_plain(case))
        )

    def step(self, case, inputs):
        """A function that computes the case once: the loss and, unless the mode is "forward", its gradients."""
        if case.loss in self.floors:
            return self.floors[case.loss](inputs)
        if isinstance(self.losses, dict):
            loss = functools.partial(self.losses[case.loss], tau=case.tau)
        else:
            loss = self.losses(case.tau)[case.loss]
        if self.compiled:
            torch.compiler.reset()  # each case is compiled anew, and never reuses the code of an earlier one
            loss = torch.compile(loss, dynamic=False)
        return _forward(loss, inputs) if case.mode == "forward" else _both(loss, inputs)


def _is_plain(case):
    return case.mode == "forward+backward" and case.dtype == torch.float32


def _forward(loss, inputs):
    def step():
        with torch.no_grad():
            return loss(*inputs), None

    return step


def _both(loss, inputs):
    def step():
        value = loss(*inputs)
        return value.detach(), torch.autograd.grad(value, [x for x in inputs if x.requires_grad])

    return step


def ours(backend):
    """This library with one of its backends."""

    def by(function):
        return lambda *inputs, tau: function(*inputs, temperature=tau, backend=backend)

    losses = dict(nt_xent=tk.nt_xent, clip=tk.clip_loss, views=tk.instance_contrastive)
    losses |= dict(local_local=tk.local_local, global_local=tk.global_local)
    losses["rectangle"] = losses["queue"] = lambda *inputs, **settings: tk.rectangle(*inputs, **settings).mean()
    losses["sup_con"] = lambda z, **settings: tk.sup_con(z, baselines.classes(len(z)), **settings)
    losses["dcl"] = functools.partial(tk.nt_xent, decoupled=True)
    losses["moco"] = lambda q, k, queue, **settings: tk.info_nce(
        q, k, negatives=queue.clone(), in_batch=False, **settings
    )
    losses["tclr_release"] = lambda *inputs, **settings: tk.tclr(*inputs, form="release", **settings).total
    return {name: by(function) for name, function in losses.items()}


FASTEST = {
    "nt_xent": baselines.nt_xent,
    "clip": baselines.clip,
    "views": baselines.views,
    "local_local": baselines.local_local,
    "global_local": baselines.global_local,
    "rectangle": baselines.log_sum_exp,
    "queue": baselines.log_sum_exp,
    "sup_con": baselines.sup_con,
    "dcl": baselines.dcl,
    "moco": baselines.moco,
    "tclr_release": baselines.release_batched,
}
WRITTEN = {
    "nt_xent": baselines.nt_xent_masked,
    "views": baselines.views_in_pairs,
    "local_local": baselines.local_local_loop,
    "global_local": baselines.global_local_loop,
    "sup_con": baselines.sup_con_masked,
    "dcl": baselines.dcl_blocks,
    "moco": baselines.moco_concatenated,
    "tclr_release": baselines.release,
}
PEERS_SERVE = {
    peers.lightly: {"nt_xent", "dcl"},
    peers.metric_learning: {"nt_xent"},
    peers.metric_learning_supcon: {"nt_xent", "sup_con"},
    peers.flex_attention: {"nt_xent"},
    peers.open_clip: {"clip"},
    peers.inf_cl: {"clip"},
    peers.memeff: {"clip"},
}
PROVIDERS = {
    "native": Provider("tclr-kernels", "native", ours("native"), largest=1 << 40),
    "reference": Provider("tclr-kernels, reference", "reference", ours("reference"), largest=2048),
    "dense": Provider("PyTorch, fastest form", "eager", FASTEST),
    "compile": Provider("torch.compile of the fastest form", "inductor", FASTEST, compiled=True),
    "written": Provider("PyTorch, as usually written", "eager", WRITTEN),
    "solo": Provider("PyTorch, form of solo-learn", "eager", dict(nt_xent=baselines.nt_xent_exponentials)),
    "linear": Provider("F.linear_cross_entropy", "eager", dict(clip=baselines.clip_linear)),
    "lightly": Provider("lightly NTXentLoss", "eager", peers.lightly),
    "pml": Provider("pytorch-metric-learning NTXentLoss", "eager", peers.metric_learning, largest=512),
    "pml-supcon": Provider("pytorch-metric-learning SupConLoss", "eager", peers.metric_learning_supcon),
    "open_clip": Provider("open_clip ClipLoss", "eager", peers.open_clip),
    "flex": Provider("FlexAttention's log-sum-exp", "inductor", peers.flex_attention),
    "inf_cl": Provider("Inf-CL", "triton", peers.inf_cl),
    "memeff": Provider("memeff", "triton", peers.memeff),
    "products": Provider("its three matrix products alone", "gemm", floors=dict(nt_xent=floors.products)),
    "floor": Provider("the arithmetic alone", "registers", floors=dict(nt_xent=floors.arithmetic), largest=1 << 40),
}


def serving(case):
    """The providers that compute a case, by name."""
    return {name: p for name, p in PROVIDERS.items() if p.serves(case)}
