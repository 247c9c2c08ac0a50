"""The whole TCLR objective in one call of a backend has the values and gradients of its single losses."""

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

from . import oracle
from .conftest import usable
from .oracle import LOSSES

SIZES = {
    "one video": (1, 3, 5),
    "one clip": (4, 1, 5),
    "one value": (3, 2, 1),
    "ragged": (7, 3, 33),
    "a batch": (40, 4, 128),
}
WEIGHTS = {
    "default": None,
    "all": dict(ic_global=0.5, ic_local=3.0, ll=2.0, gl=0.25),
    "local": dict(ic_global=0, ic_local=1.5, ll=0, gl=0),
    "temporal": dict(ic_global=0, ic_local=0, ll=0.5, gl=2.0),
    "none": dict(ic_global=0, ic_local=0, ll=0, gl=0),
}


@pytest.fixture(params=[name for name, module in backends.BACKENDS.items() if hasattr(module, "objective")])
def fused(request):
    return usable(request.param)


def gradients(inputs, pick, **settings):
    """The gradient of pick(terms) for the temperature and the inputs, all in one list."""
    inputs = [z.detach().requires_grad_() for z in (torch.tensor(0.3, dtype=torch.float64), *inputs)]
    terms = tk.tclr(*inputs[1:], temperature=inputs[0], **settings)
    grads = torch.autograd.grad(pick(terms), inputs, materialize_grads=True)
    return torch.stack(terms).detach(), grads


PICKS = {
    "total": lambda terms: 3 * terms.total,
    **{name: lambda terms, name=name: getattr(terms, name) for name in ("ic_global", "ic_local", "ll", "gl")},
    "total and a term": lambda terms: terms.total - 2 * terms.ll,
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["paper", "release"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_every_gradient_are_those_of_the_reference(size, form, weights, fused):
    inputs = LOSSES["tclr"].inputs(SIZES[size])
    for pick in PICKS.values():
        settings = dict(form=form, weights=WEIGHTS[weights])
        found = gradients(inputs, pick, **settings, backend=fused)
        wanted = gradients(inputs, pick, **settings, backend="reference")
        for f, w in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-12)


def test_strides_change_no_bit_of_the_gradients(fused):
    g, s, x = LOSSES["tclr"].inputs((5, 3, 4))
    odd = g.mT.contiguous().mT, s.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), x.repeat(1, 2, 1, 1)[:, ::2]
    even = [z.contiguous() for z in odd]
    found, wanted = (gradients(inputs, PICKS["total"], backend=fused)[1] for inputs in (odd, even))
    assert all(map(torch.equal, found, wanted))


def test_one_tensor_as_several_inputs_gets_the_same_gradient_twice(fused):
    _, _, x = LOSSES["tclr"].inputs((5, 3, 4))
    x.requires_grad_()
    g = x.mean(2)
    total = tk.tclr(g, x, x, form="release", backend=fused).total
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (again,) = torch.autograd.grad(total, x)
    (wanted,) = torch.autograd.grad(tk.tclr(x.mean(2), x, x, form="release", backend="reference").total, x)
    assert torch.equal(first, again) and oracle.error(first, wanted) < 1e-12


def test_no_gradient_is_computed_unless_one_is_needed(fused, monkeypatch):
    asked = []
    original = backends.BACKENDS[fused].objective

    def objective(*arguments):
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(backends.BACKENDS[fused], "objective", objective)
    inputs = LOSSES["tclr"].inputs((3, 2, 4))
    tk.tclr(*inputs, backend=fused)
    leaves = [z.requires_grad_() for z in inputs]
    with torch.no_grad():
        tk.tclr(*leaves, backend=fused)
    tk.tclr(*leaves, backend=fused)
    tk.tclr(*(z.detach() for z in inputs), temperature=torch.tensor(0.1, requires_grad=True), backend=fused)
    assert asked == [False, False, True, True]


def test_small_gradients_of_float16_inputs_are_accurate_with_a_scaled_loss(fused):
    inputs = [1e3 * z for z in LOSSES["tclr"].inputs((8, 2, 16))]  # their gradients are about 1e-8
    half = [z.half().requires_grad_() for z in inputs]
    (2.0**14 * tk.tclr(*half, backend=fused).total).backward()
    exact = [z.detach().double().requires_grad_() for z in half]
    (2.0**14 * tk.tclr(*exact, backend="reference").total).backward()
    for h, e in zip(half, exact, strict=True):
        torch.testing.assert_close(h.grad.double(), e.grad, rtol=2e-3, atol=1e-3 * e.grad.abs().max().item())


def test_a_second_derivative_and_an_input_modified_before_backward_are_errors(fused):
    leaves = [z.requires_grad_() for z in LOSSES["tclr"].inputs((3, 2, 4))]
    slope = torch.autograd.grad(tk.tclr(*leaves, backend=fused).total, leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative.*backend="reference"'):
        slope[0].sum().backward()
    total = tk.tclr(*leaves, backend=fused).total
    with torch.no_grad():
        leaves[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_compiled_objective_has_the_gradients_of_eager_mode(fused):
    leaves = [z.requires_grad_() for z in LOSSES["tclr"].inputs((3, 2, 4))]
    function = torch.compile(
        lambda *z: tk.tclr(*z, form="release", backend=fused).total, fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(function(*leaves), leaves)
    wanted = torch.autograd.grad(tk.tclr(*leaves, form="release", backend=fused).total, leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_gradient_beyond_float32_is_scaled_before_it_is_rounded(fused):
    """The rows are so short that their gradient would be infinite without the small upstream gradient."""
    leaves = [(1e-38 * z).float().requires_grad_() for z in LOSSES["tclr"].inputs((5, 3, 7))]
    for factor in (1e-6, 0.0):
        found = torch.autograd.grad(factor * tk.tclr(*leaves, temperature=1e-3, backend=fused).total, leaves)
        wanted = torch.autograd.grad(factor * tk.tclr(*leaves, temperature=1e-3, backend="reference").total, leaves)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4 * w.abs().max().item())
