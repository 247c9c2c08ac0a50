"""A small loss with labels that a backend computes in one call has the values of the separate calls, with autograd."""

import functools

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends, general, labelled

from .conftest import usable
from .test_reduced import Calls

SHAPES = {"one row": (1, 1, 1, 5), "a batch": (1, 80, 80, 128), "ragged": (1, 67, 150, 33), "groups": (7, 9, 20, 16)}
SHAPES |= {"several blocks": (1, 300, 341, 9), "more rows than columns": (2, 200, 30, 24)}
FORMS = "symmetric", "with itself among the columns", "rows and columns"
UNIT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KERNELS = [name for name, module in backends.BACKENDS.items() if hasattr(module, "labelled")]


@pytest.fixture(params=KERNELS)
def fused(request):
    return usable(request.param)


class Problem:
    """Rows, columns, keys and settings of one call."""

    def __init__(self, shape, form, backend, dtype=torch.float32, normalize=True, classes=4, scale=1.0):
        G, n, K, D = shape
        generator = torch.Generator().manual_seed(0)
        n = K if form == "symmetric" else min(n, K) if form == "with itself among the columns" else n
        columns = scale * torch.randn(G, K, D, generator=generator, dtype=torch.float64)
        rows = scale * torch.randn(G, n, D, generator=generator, dtype=torch.float64)
        keys = torch.randint(-1, classes, (G, K), generator=generator)
        of_rows = torch.randint(-1, classes, (G, n), generator=generator)
        first = -1 if form == "rows and columns" else 0
        if first == 0:
            rows, of_rows = columns[:, :n], keys[:, :n].contiguous()
        sides = [columns] if form == "symmetric" else [rows, columns]
        self.sets = [x.to(dtype).clone().requires_grad_() for x in sides]
        self.keys, self.settings = (of_rows, keys), general.Settings(backend, normalize, first=first)

    def loss(self, tau=0.1, call=labelled.labelled, **settings):
        rows, columns = self.sets[:-1], self.sets[-1:]
        return call(self.settings, tau, self.keys, rows, columns, **settings)

    def results(self, tau=0.1, upstream=1.0, **settings):
        loss = self.loss(tau, **settings)
        return [loss.detach(), *torch.autograd.grad(upstream * loss, self.sets)]


def close(found, wanted, unit):
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(x.isfinite(), y.isfinite())
        x, y = (z[y.isfinite()].double() for z in (x, y))
        assert (x - y).norm() <= unit * y.norm() + 1e-30


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spread, count", [(True, None), (True, 3.5), (False, 7.0)])
def test_values_and_gradients_are_those_of_the_separate_calls(spread, count, shape, form, fused):
    how = dict(spread=spread, count=count)
    for dtype, normalize, tau, classes in (
        (torch.float64, True, 0.1, 4),
        (torch.float64, False, 0.5, 1),
        (torch.float32, True, 0.03, 50),
        (torch.float32, False, 0.7, 4),
        (torch.bfloat16, True, 0.1, 4),
        (torch.float16, True, 0.1, 4),
    ):
        problem = Problem(shape, form, fused, dtype, normalize, classes, 1.0 if normalize else 0.3)
        with torch.no_grad():
            close([problem.loss(tau, **how)], [problem.loss(tau, call=labelled.composed, **how)], UNIT[dtype])
        for upstream in (1.0, 0.3):
            wanted = problem.results(tau, upstream, call=labelled.composed, **how)
            close(problem.results(tau, upstream, **how), wanted, UNIT[dtype])


def test_sup_con_and_its_gradient_are_one_operator_call(fused):
    z, labels = torch.randn(80, 16, requires_grad=True), torch.arange(40).repeat(2)
    with Calls() as calls:
        loss = tk.sup_con(z, labels, backend=fused)
        loss.backward()
    assert [name for name in calls.names if name.startswith("tclr")] == ["tclr_kernels::labelled"]


@pytest.mark.parametrize("shape, learnable", [((2000, 4), False), ((5000, 2, 4), False), ((20, 4), True)])
def test_many_rows_many_groups_and_learnable_temperatures_use_the_separate_calls(shape, learnable, fused):
    tau = torch.tensor(0.1, requires_grad=True) if learnable else 0.1
    with Calls() as calls:
        tk.sup_con(torch.randn(shape), torch.arange(shape[-2]) % 5, tau, backend=fused)
    assert "tclr_kernels::rectangle" in calls.names and "tclr_kernels::labelled" not in calls.names


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_sets_that_need_a_gradient_get_one(needed, fused):
    problem = Problem((1, 40, 70, 8), "rows and columns", fused)
    _, *wanted = problem.results(spread=True)
    problem.sets = [z.detach().requires_grad_(need) for z, need in zip(problem.sets, needed, strict=True)]
    problem.loss(spread=True).backward()
    for z, w, need in zip(problem.sets, wanted, needed, strict=True):
        assert torch.equal(z.grad, w) if need else z.grad is None


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_the_number_of_threads(threads, fused):
    before = torch.get_num_threads()
    problems = [Problem((1, 300, 600, 64), form, fused) for form in FORMS]
    try:
        wanted = [problem.results(spread=True) for problem in problems]
        torch.set_num_threads(threads)
        found = [problem.results(spread=True) for problem in problems]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for f, w in zip(found, wanted, strict=True) for x, y in zip(f, w, strict=True))


@pytest.mark.parametrize("scale, upstream", [(1e-38, 1e-6), (1e-38, 0.0), (1e37, 2.0**40)])
def test_a_gradient_at_the_limits_of_float32_is_scaled_before_it_is_rounded(scale, upstream, fused):
    problem = Problem((1, 7, 9, 5), "rows and columns", fused, scale=scale)
    wanted = problem.results(0.001, upstream, call=labelled.composed, spread=True, count=1.0)
    close(problem.results(0.001, upstream, spread=True, count=1.0), wanted, 1e-6)


def test_rows_without_positives_have_the_term_zero(fused):
    z = torch.randn(6, 4, requires_grad=True)
    assert tk.sup_con(z, torch.arange(6), backend=fused) == 0
    tk.sup_con(z, torch.tensor([-1] * 6), backend=fused).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_a_row_that_is_not_finite_has_the_same_effect_as_in_the_separate_calls(fused):
    problem = Problem((1, 30, 30, 5), "symmetric", fused)
    with torch.no_grad():
        problem.sets[0][0, 3, 2] = torch.nan
    found, wanted = (
        problem.results(spread=True, call=call, count=3.0) for call in (labelled.labelled, labelled.composed)
    )
    assert torch.equal(found[0].isnan(), wanted[0].isnan())
    assert torch.equal(found[1].isnan(), wanted[1].isnan())


def test_a_retained_graph_gives_the_same_gradient_and_a_second_derivative_is_an_error(fused):
    z, labels = torch.randn(8, 4, requires_grad=True), torch.arange(4).repeat(2)
    loss = tk.sup_con(z, labels, backend=fused)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    wanted = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, z)[0], wanted)
    (slope,) = torch.autograd.grad(tk.sup_con(z, labels, backend=fused), z, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative.*backend="reference"'):
        slope.sum().backward()


def test_gradients_equal_finite_differences(fused):
    for form in FORMS:
        problem = Problem((2, 4, 6, 3), form, fused, torch.float64)

        def loss(*sets, problem=problem):
            problem.sets = sets
            return problem.loss(spread=True)

        assert torch.autograd.gradcheck(loss, problem.sets)


def test_transforms_and_the_compiler_use_the_separate_calls(fused):
    z, labels = torch.randn(8, 4), torch.arange(4).repeat(2)
    loss = functools.partial(tk.sup_con, labels=labels, backend=fused)
    wanted = torch.autograd.grad(loss(z.requires_grad_()), z)[0]
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), wanted)
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(traced(z), z)[0], wanted)


def test_the_operator_passes_pytorchs_opcheck(fused):
    problem = Problem((1, 7, 9, 5), "rows and columns", fused)
    rows, columns = ([z.detach()] for z in problem.sets)
    arguments = rows, columns, 0.1, True, -1, *problem.keys, True, 3.0, True, True
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.tclr_kernels.labelled.default, arguments, test_utils=checks)


def test_wrong_arguments_of_the_operator_are_errors(fused):
    problem = Problem((1, 7, 9, 5), "rows and columns", fused)
    rows, columns = ([z.detach()] for z in problem.sets)
    call = torch.ops.tclr_kernels.labelled
    with pytest.raises(RuntimeError, match="rows, columns: wanted one set of each"):
        call(rows * 2, columns, 0.1, True, -1, *problem.keys, True, 3.0, True, True)
    with pytest.raises(RuntimeError, match="for_columns: found true, wanted false where"):
        call([], columns, 0.1, True, 0, problem.keys[1], problem.keys[1], True, 3.0, True, True)
    with pytest.raises(RuntimeError, match="keys: wanted CPU tensors of int64"):
        call(rows, columns, 0.1, True, -1, *(k.int() for k in problem.keys), True, 3.0, True, True)
