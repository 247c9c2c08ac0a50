"""The whole TCLR objective in one call of a backend that offers it. The same call computes values and gradient.

Such a backend has two more functions:

    objective(g, s, x, tau, normalize, scales, weights, gradient) -> (terms, kept)
    objective_backward(g, s, x, tau, normalize, scales, weights, kept, upstream) -> gradients

terms: the total and its four terms, 0-d.
kept: if `gradient`, the tensors from which `objective_backward` computes the gradients of upstream times the total, for
g, s, x (in their dtype) and tau (in the dtype of the total). It is empty if those for an upstream of 1 are not finite,
or near underflow. The backward then differentiates the single losses, since for another upstream they may be in range.
scales, weights: term_k = scale_k times the sum over its anchors, total = sum_k weight_k term_k.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .symmetric import Eager, Once, wants_gradient

Compose = Callable[..., tuple[Tensor, ...]]


def objective(
    name: str,
    compose: Compose,
    normalize: bool,
    scales: list[float],
    weights: list[float],
    tau: float | Tensor,
    g: Tensor,
    s: Tensor,
    x: Tensor,
) -> tuple[Tensor, ...]:
    """total, ic_global, ic_local, ll, gl by the backend of that name.

    compose: computes the same from (tau, g, s, x) by single losses, which is differentiated if single terms get
    upstream gradients.
    """
    gradient = wants_gradient(tau, g, s, x)
    return Objective.apply(name, compose, normalize, scales, weights, gradient, tau, g, s, x)[:5]


class Objective(Eager, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        compose: Compose,
        normalize: bool,
        scales: list[float],
        weights: list[float],
        gradient: bool,
        tau: float | Tensor,
        g: Tensor,
        s: Tensor,
        x: Tensor,
    ) -> tuple[Tensor, ...]:
        terms, kept = backends.BACKENDS[name].objective(g, s, x, tau, normalize, scales, weights, gradient)
        return *terms, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.compose, *ctx.settings, _, tau, g, s, x = inputs
        kept = output[5:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.tau = None if isinstance(tau, torch.Tensor) else tau
        ctx.save_for_backward(tau if ctx.tau is None else None, g, s, x, *kept)

    @staticmethod
    def backward(ctx: Any, g_total: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        tau, g, s, x, *kept = ctx.saved_tensors
        tau = tau if ctx.tau is None else ctx.tau
        call = ObjectiveBackward.apply if torch.is_grad_enabled() else ObjectiveBackward.forward
        results = call(ctx.name, ctx.compose, ctx.settings, tau, g, s, x, g_total, *others[:4], *kept)
        results = [d if needed else None for d, needed in zip(results, ctx.needs_input_grad[6:], strict=True)]
        return *[None] * 6, *results


class ObjectiveBackward(Once, torch.autograd.Function):
    @staticmethod
    def forward(
        name: str,
        compose: Compose,
        settings: Sequence[Any],
        tau: float | Tensor,
        g: Tensor,
        s: Tensor,
        x: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        upstream, kept = others[:5], others[5:]
        variables = [z for z in (tau, g, s, x) if isinstance(z, torch.Tensor)]  # not a float tau
        reached = [k for k, u in enumerate(upstream) if u is not None]
        if not reached:
            results = []
        elif kept and reached == [0]:
            backward = backends.BACKENDS[name].objective_backward
            *results, d_tau = backward(g, s, x, tau, *settings, kept, upstream[0])
            if isinstance(tau, torch.Tensor):
                results = [d_tau.to(tau), *results]
        else:
            with torch.enable_grad():
                variables = [z.detach().requires_grad_() for z in variables]
                terms = compose(*[tau][: 4 - len(variables)], *variables)
            upstream = [upstream[k] for k in reached]
            results = torch.autograd.grad([terms[k] for k in reached], variables, upstream, materialize_grads=True)
        return *[None] * (4 - len(results)), *results
