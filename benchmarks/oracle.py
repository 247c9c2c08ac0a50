"""The correct results: every loss in float64, by its definition. Providers are checked with it before being timed."""

from typing import NamedTuple

import torch

from .providers import ours

LARGEST = 8192  # rows whose matrix fits in float64 (0.5 GB); with more, a sample of the gradient's rows is compared
# allowed errors, relative to max(1, loss) and to the largest entry of the gradient
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-5, 5e-3), torch.bfloat16: (1e-5, 2e-2)}


class Truth(NamedTuple):
    """The loss, and the gradient of those rows of the inputs that are compared. rows None: all rows."""

    loss: torch.Tensor
    grads: list
    rows: torch.Tensor | None


def truth(case, inputs):
    """The result in float64 for the given inputs, which are tensors of the case's shapes."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    if case.entries <= LARGEST**2 or case.loss not in ("nt_xent", "clip"):
        # native in float64 is itself tested against the reference
        backend = "reference" if case.entries <= LARGEST**2 else "native"
        loss = ours(backend)[case.loss](*wide, tau=case.tau)
        return Truth(loss.detach(), torch.autograd.grad(loss, [x for x in wide if x.requires_grad]), None)
    return _sampled(*[x.detach() for x in wide], case.tau, cross=case.loss == "clip")


def _sampled(a, b, tau, cross, chunk=256):
    """NT-Xent or CLIP of all rows a, b: [N, D], and its gradient for evenly spaced rows of each."""
    N, M = len(a), 2 * len(a)
    x = torch.cat([a, b])
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    lse = torch.cat([_scores(z, rows, tau, cross).logsumexp(1) for rows in torch.arange(M).split(chunk)])
    partner = torch.arange(M).roll(N)
    loss = (lse - (z * z[partner]).sum(1) / tau).mean()
    rows = torch.linspace(0, N - 1, chunk // 2).long()
    grads = []
    for row in (rows, rows + N):
        S = _scores(z, row, tau, cross)
        W = (S - lse[row, None]).exp() + (S - lse).exp()
        W[torch.arange(len(row)), partner[row]] -= 2
        dz = W @ z / (tau * M)
        grads.append((dz - z[row] * (dz * z[row]).sum(1, keepdim=True)) / norm[row])
    return Truth(loss, grads, rows)


def _scores(z, rows, tau, cross):
    """The similarities of some rows with all rows: [len(rows), M], -inf for those that are not candidates."""
    S = z[rows] @ z.T / tau
    if cross:
        first = torch.arange(len(z)) < len(z) // 2
        return S.masked_fill(first[rows, None] == first, -torch.inf)
    S[torch.arange(len(rows)), rows] = -torch.inf
    return S


def errors(result, right):
    """The errors of a result (loss, gradients): of the loss, over max(1, loss); of the gradient, over its maximum."""
    loss, grads = result
    of_loss = (loss.double() - right.loss).abs() / right.loss.abs().clamp(min=1)
    if grads is None:
        return float(of_loss), 0.0
    if right.rows is not None:
        grads = [g[right.rows] for g in grads]
    of_grad = [(g.double() - w).abs().max() / w.abs().max() for g, w in zip(grads, right.grads, strict=True)]
    return float(of_loss), float(torch.stack(of_grad).max())


def holds(loss_error, grad_error, dtype):
    """Whether the errors are small enough for inputs of a dtype. NaN is not."""
    of_loss, of_grad = TOLERANCE[dtype]
    return loss_error <= of_loss and grad_error <= of_grad
