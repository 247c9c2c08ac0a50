"""Gradients equal finite differences in float64, for every loss, reduction, subset of inputs and the temperature."""

import functools
import itertools

import pytest
import torch

from tclr_kernels.gram import gram

from . import oracle
from .oracle import LOSSES

SIZES = 3, 3, 2


def with_temperature(call, tau, *inputs, **settings):
    return call(*inputs, temperature=tau, **settings)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_every_subset_of_inputs_equal_finite_differences(name, normalize, float64):
    loss = LOSSES[name]
    call = functools.partial(with_temperature, loss.call, normalize=normalize, backend=float64)
    inputs = [torch.tensor(0.4, dtype=torch.float64), *loss.inputs(SIZES, normalize=normalize)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    _, grads = oracle.run(call, inputs)
    # if negatives need no gradient, that of the rows is computed in another way
    allowed = 1e-13 if name in oracle.SEVERAL_CALLS else 0
    for needed in itertools.product([False, True], repeat=len(inputs)):
        some = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        if any(needed):
            call(*some).sum().backward()
        for x, need, grad in zip(some, needed, grads, strict=True):
            assert oracle.error(x.grad, grad) <= allowed if need else x.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("tclr")])
def test_gradients_of_every_reduction_equal_finite_differences(name, reduction, float64):
    inputs = [x.requires_grad_() for x in LOSSES[name].inputs(SIZES)]
    call = functools.partial(LOSSES[name].call, temperature=0.4, reduction=reduction, backend=float64)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("V", [1, 2, 3, 4])
@pytest.mark.parametrize("output", ["term", "neg", "pos"])
def test_gradients_of_every_output_of_the_operation_equal_finite_differences(output, V, cross, float64):
    """`neg` is among them, which no loss of the library uses alone."""
    sets = [x.requires_grad_() for x in oracle.correlated([(2, 3, 2)] * V, 0.3, 0)]
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def call(tau, *sets):
        out = gram(sets, tau, cross=cross, backend=float64)[("term", "neg", "pos").index(output)]
        return out.where(out.isfinite(), 0)

    assert torch.autograd.gradcheck(call, (tau, *sets))


def test_rows_of_the_weight_matrix_sum_to_zero(float64):
    """If z is square, the symmetric weights W + W^T of an anchor are tau dz z^-1, and their sum is zero."""
    for name in ("nt_xent", "clip_loss", "instance_contrastive"):
        inputs = LOSSES[name].inputs((4, 2, 8), normalize=False)
        z = torch.cat([x.reshape(-1, 8) for x in inputs])
        shape = LOSSES[name].call(*inputs).shape
        for anchor in range(shape.numel()):
            upstream = torch.zeros(shape).index_fill(-1, torch.tensor(0), 0).flatten()
            upstream[anchor] = 1
            _, grads = oracle.run(
                LOSSES[name].call, inputs, upstream.view(shape), normalize=False, temperature=0.5, backend=float64
            )
            weights = 0.5 * torch.cat([g.reshape(-1, 8) for g in grads]) @ z.inverse()
            assert abs(weights.sum()) < 1e-12 and (weights - weights.mT).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "local_local", "global_local"])
def test_a_tensor_used_twice_gets_the_sum_of_both_gradients(name, float64):
    loss = LOSSES[name]
    x = loss.inputs((5, 3, 4))[0]
    found = oracle.run(lambda z: loss.call(z, z, backend=float64), [x])
    wanted = oracle.run(lambda z: loss.textbook([z, z], 0.1), [x])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_tensor_used_three_times_in_the_objective_gets_the_sum_of_all_gradients(float64):
    loss = LOSSES["tclr release"]
    (x,) = oracle.correlated([(2, 4, 3, 5)], 0, 0)
    found = oracle.run(lambda x: loss.call(x[:, :, 0], x, x, backend=float64), [x])
    wanted = oracle.run(lambda x: loss.textbook([x[:, :, 0], x, x], 0.1), [x])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
