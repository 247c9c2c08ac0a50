"""The error of the gradient against the temperature, for NT-Xent of each provider and dtype, with similar views."""

import itertools

import torch

from . import cases, oracle, providers, rows

TAUS = 1.0, 0.3, 0.1, 0.05, 0.03, 0.02, 0.01
NAMES = "native", "dense", "written", "solo", "lightly", "pml"
COLUMNS = "provider", "dtype", "tau", "status", "loss_error", "grad_error", "torch", "commit", "date"
N, D, COSINE = 128, 128, 0.9


def path():
    return rows.RESULTS / "accuracy.csv"


def run():
    rows.record(path(), COLUMNS, lines())


def lines():
    """A row for each provider, dtype and temperature; if a provider fails, with its error message."""
    for dtype, tau in itertools.product((torch.float32, torch.float16, torch.bfloat16), TAUS):
        case = cases.nt_xent(2 * N, "accuracy", D, dtype=dtype, tau=tau)
        inputs = _views(dtype)
        right = oracle.truth(case, inputs)
        for name in NAMES:
            row = dict(provider=name, dtype=str(dtype).removeprefix("torch."), tau=tau)
            yield row | rows.attempted(_errors, providers.PROVIDERS[name], case, inputs, right)


def _views(dtype):
    common, *noise = torch.randn(3, N, D, generator=torch.Generator().manual_seed(0))
    return [(COSINE**0.5 * common + (1 - COSINE) ** 0.5 * x).to(dtype).requires_grad_() for x in noise]


def _errors(provider, case, inputs, right):
    loss_error, grad_error = oracle.errors(provider.step(case, inputs)(), right)
    return dict(loss_error=f"{loss_error:.2e}", grad_error=f"{grad_error:.2e}")
