"""A small loss that a backend computes in one call has the bits of the separate calls, and works with autograd."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tclr_kernels as tk
from tclr_kernels import backends, reduced

from .conftest import usable

LOSSES = {
    "nt_xent": tk.nt_xent,
    "nt_xent, one side": functools.partial(tk.nt_xent, symmetric=False),
    "clip_loss": tk.clip_loss,
    "info_nce": tk.info_nce,
    "local_local": tk.local_local,
    "local_local, one side": functools.partial(tk.local_local, symmetric=False),
    "global_local": tk.global_local,
    "instance_contrastive": lambda a, b, *tau, **settings: tk.instance_contrastive(
        torch.stack([a, b, a + b]), *tau, **settings
    ),
}
SHAPES = {"one row": (1, 5), "a batch": (40, 128), "ragged": (67, 33), "several blocks": (300, 9), "groups": (7, 4, 16)}
CASES = [
    (name, shape)
    for name in LOSSES
    for shape in SHAPES
    if not (("local" in name and shape != "groups") or (name == "instance_contrastive" and shape == "groups"))
]
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
TEMPERATURES = 0.1, 0.01, torch.tensor(0.2, dtype=torch.float64), torch.tensor([0.2], dtype=torch.float16)


@pytest.fixture(params=[name for name, module in backends.BACKENDS.items() if hasattr(module, "reduced")])
def fused(request):
    return usable(request.param)


@pytest.fixture
def compose(monkeypatch):
    """A function. Once it is called, every loss uses the separate calls instead of a single one."""
    return lambda: monkeypatch.setattr(reduced, "must_be_composed", lambda inputs: True)


class Calls(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def inputs(shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [(scale * x).to(dtype).requires_grad_() for x in made]


def results(loss, leaves, tau, upstream=1.0, **settings):
    tau = tau.clone().requires_grad_() if isinstance(tau, torch.Tensor) else tau
    value = loss(*leaves, tau, **settings)
    wanted = [*leaves, *([tau] if isinstance(tau, torch.Tensor) else [])]
    return [value.detach(), *torch.autograd.grad(upstream * value, wanted)]


def same(found, wanted):
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name, shape", CASES)
def test_one_call_has_the_bits_of_the_separate_calls(name, shape, fused, compose):
    settings = [
        (dtype, tau, dict(reduction=reduction, normalize=normalize, backend=fused))
        for dtype in DTYPES
        for tau in TEMPERATURES
        for reduction, normalize in (("mean", True), ("sum", False))
    ]

    def everything():
        made = []
        for dtype, tau, others in settings:
            leaves = inputs(SHAPES[shape], dtype, 1.0 if others["normalize"] else 0.3)
            with torch.no_grad():
                made.append([LOSSES[name](*leaves, tau, **others)])
            made += [results(LOSSES[name], leaves, tau, upstream, **others) for upstream in (1.0, 0.25)]
        return made

    found = everything()
    compose()
    assert all(map(same, found, everything()))


def test_an_upstream_gradient_that_is_no_power_of_two_costs_one_rounding(fused, compose):
    leaves = inputs((40, 128))
    found = results(tk.nt_xent, leaves, 0.1, 0.3, backend=fused)
    compose()
    wanted = results(tk.nt_xent, leaves, 0.1, 0.3, backend=fused)
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("name, shape", [case for case in CASES if case[1] in ("a batch", "groups")])
def test_a_loss_and_its_gradient_are_one_operator_call_each(name, shape, fused):
    leaves = inputs(SHAPES[shape])
    loss = functools.partial(LOSSES[name], backend=fused)
    with Calls() as calls:
        value = loss(*leaves)
    assert [call for call in calls.names if call.startswith("tclr")] == ["tclr_kernels::reduced"]
    with Calls() as calls:
        value.backward()
    assert [call for call in calls.names if call.startswith("tclr")] == ["tclr_kernels::reduced_backward"]
    if name != "instance_contrastive":  # it also stacks its views
        assert len(calls.names) <= 4  # the others make the upstream gradient and add up gradients
    with Calls() as calls, torch.no_grad():
        loss(*leaves)
    assert calls.names[-1] == "tclr_kernels::reduced" and (len(calls.names) == 1 or name == "instance_contrastive")


def test_large_losses_use_the_separate_calls(fused):
    leaves = inputs((20000, 2))
    with Calls() as calls:
        tk.nt_xent(*leaves, backend=fused)
    assert "tclr_kernels::gram_forward" in calls.names


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_needs_a_gradient_gets_one(needed, fused):
    leaves = inputs((7, 5))
    tau = torch.tensor(0.1)
    wanted = torch.autograd.grad(tk.nt_xent(*leaves, tau, backend=fused), leaves)
    some = [x.detach().requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
    tk.nt_xent(*some, tau, backend=fused).backward()
    assert tau.grad is None
    assert all(
        torch.equal(x.grad, w) if need else x.grad is None for x, w, need in zip(some, wanted, needed, strict=True)
    )


def test_a_retained_graph_gives_the_same_gradients_again(fused):
    leaves = inputs((7, 5))
    value = tk.nt_xent(*leaves, backend=fused)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    assert all(map(torch.equal, torch.autograd.grad(value, leaves), kept))


def test_activation_checkpointing_gives_the_same_gradients(fused):
    leaves = inputs((7, 5))
    loss = functools.partial(tk.nt_xent, backend=fused)
    found = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    assert same(found, torch.autograd.grad(loss(*leaves), leaves))


def test_a_second_derivative_and_an_input_modified_before_backward_are_errors(fused):
    leaves = inputs((7, 5))
    slope = torch.autograd.grad(tk.nt_xent(*leaves, backend=fused), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative.*backend="reference"'):
        slope[0].sum().backward()
    value = tk.nt_xent(*leaves, backend=fused)
    with torch.no_grad():
        leaves[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("scale, factor", [(1e-38, 1e-6), (1e-38, 0.0), (1e37, 2.0**40)])
def test_a_gradient_at_the_limits_of_float32_is_scaled_before_it_is_rounded(scale, factor, fused, compose):
    leaves = inputs((7, 5), scale=scale)
    found = results(tk.nt_xent, leaves, torch.tensor(0.001), factor, backend=fused)
    compose()
    assert same(found, results(tk.nt_xent, leaves, torch.tensor(0.001), factor, backend=fused))


def test_transforms_and_tensor_subclasses_use_the_separate_calls(fused):
    leaves = [x.detach() for x in inputs((7, 5))]
    loss = functools.partial(tk.nt_xent, backend=fused)
    wanted = torch.autograd.grad(loss(*(x.requires_grad_() for x in leaves)), leaves)
    leaves = [x.detach() for x in leaves]
    assert same(torch.func.grad(loss, (0, 1))(*leaves), wanted)
    with pytest.raises(NotImplementedError, match="forward mode differentiation"):
        torch.func.jvp(loss, tuple(leaves), tuple(leaves))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves[0], leaves[1])
        with pytest.raises(NotImplementedError, match="forward mode differentiation"):
            loss(dual, leaves[1])

    class Own(torch.Tensor):
        pass

    with Calls() as calls:
        assert torch.equal(loss(leaves[0].as_subclass(Own), leaves[1]), loss(*leaves))
    assert "tclr_kernels::gram_forward" in calls.names


@pytest.mark.parametrize("tau", [None, torch.tensor(0.1)], ids=["float", "tensor"])
def test_the_operators_pass_pytorchs_opcheck(tau, fused):
    leaves = [x.detach() for x in inputs((7, 5))]
    settings = tau, 0.1, True, False, False, 1.0, 14
    ops = torch.ops.tclr_kernels
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(ops.reduced.default, (leaves, *settings, True), test_utils=checks)
    _, kept = ops.reduced(leaves, *settings, True)
    torch.library.opcheck(ops.reduced_backward.default, (leaves, *settings, kept, torch.tensor(2.0)), test_utils=checks)
