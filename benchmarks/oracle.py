"""What is right: every loss in float64, from the definition. A provider is compared with it before it is timed."""

from typing import NamedTuple

import torch

from .baselines import ours
from .cases import TAU

LARGEST = 8192  # rows that the reference holds in float64 (0.5 GB a copy); beyond, a sample of the gradient's rows
TOLERANCE = 1e-5, 1e-4  # float32: of max(1, loss); of the gradient's largest entry


class Truth(NamedTuple):
    """The loss, and the gradient of the inputs' rows that are compared: None for all of them."""

    loss: torch.Tensor
    grads: list
    rows: torch.Tensor | None


def truth(case, inputs):
    """The float64 result for the inputs as they are. inputs: tensors of the case's shapes"""
    if case.rows <= LARGEST:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        return Truth(*ours("reference")[case.loss](wide)(), None)
    return _sampled(*[x.detach().double() for x in inputs])


def _sampled(a, b, chunk=256):
    """NT-Xent of all rows, and its gradient for evenly spaced rows of each view. a, b: [N, D]"""
    N, M = len(a), 2 * len(a)
    x = torch.cat([a, b])
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    lse = torch.cat([_scores(z, rows).logsumexp(1) for rows in torch.arange(M).split(chunk)])
    partner = torch.arange(M).roll(N)
    loss = (lse - (z * z[partner]).sum(1) / TAU).mean()
    rows = torch.linspace(0, N - 1, chunk // 2).long()
    grads = []
    for row in (rows, rows + N):
        S = _scores(z, row)
        W = (S - lse[row, None]).exp() + (S - lse).exp()
        W[torch.arange(len(row)), partner[row]] -= 2
        dz = W @ z / (TAU * M)
        grads.append((dz - z[row] * (dz * z[row]).sum(1, keepdim=True)) / norm[row])
    return Truth(loss, grads, rows)


def _scores(z, rows):
    """The similarities of some rows with all, -inf with themselves: [len(rows), M]"""
    S = z[rows] @ z.T / TAU
    S[torch.arange(len(rows)), rows] = -torch.inf
    return S


def errors(result, right):
    """The loss's error relative to max(1, loss), and the gradient's to its largest entry. result: (loss, gradients)"""
    loss, grads = result
    if right.rows is not None:
        grads = [g[right.rows] for g in grads]
    of_loss = (loss.double() - right.loss).abs() / right.loss.abs().clamp(min=1)
    of_grad = [(g.double() - w).abs().max() / w.abs().max() for g, w in zip(grads, right.grads, strict=True)]
    return float(of_loss), float(torch.stack(of_grad).max())


def holds(loss_error, grad_error):
    """Whether a float32 result is right; a nan is not."""
    return loss_error <= TOLERANCE[0] and grad_error <= TOLERANCE[1]
