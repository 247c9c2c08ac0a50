"""The general operation (ranges of anchors, rectangles, labels) against the formulas of `general.py`."""

import decimal
import functools
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tclr_kernels as tk
from tclr_kernels import backends, general

from . import oracle
from .conftest import INTERPRETED
from .oracle import DTYPES

OUTPUTS = "neg", "pos", "pos_lse", "spread", "count"


class Problem(NamedTuple):
    """A sets of n rows against C sets of K columns. first: the place of the rows among the columns, or None.

    classes: the number of labels, 0 for none; every fifth column has no label. With -1, the second half of the columns
    is another view of the first half, and the two views of a row are a class.
    """

    G: int = 1
    A: int = 1
    n: int = 5
    C: int = 1
    K: int = 7
    D: int = 6
    first: int | None = None
    classes: int = 0
    cross: bool = False
    normalize: bool = True
    symmetric: bool = False
    rho: float = 0.5
    scale: float = 1.0
    seed: int = 0

    def sets(self, dtype=torch.float64):
        """The rows and the columns, as lists of tensors. With `first`, the rows are a part of the columns."""
        length = self.scale / (1 if self.normalize else math.sqrt(self.D))
        columns = oracle.correlated([(self.G, self.K, self.D)] * self.C, self.rho, self.seed)
        if self.classes < 0:
            views = oracle.correlated([(self.G, self.K // 2, self.D)] * 2, self.rho, self.seed)
            columns = [torch.cat(views, 1)]
        columns = [(length * x).to(dtype) for x in columns]
        if self.first is None:
            rows = oracle.correlated([(self.G, self.n, self.D)] * self.A, self.rho, self.seed + 1)
            return [(length * x).to(dtype) for x in rows], columns
        return [] if self.symmetric else [x[:, self.first : self.first + self.n].clone() for x in columns], columns

    def keys(self):
        if not self.classes:
            return None, None
        if self.classes < 0:
            pairs = torch.arange(self.K // 2).repeat(2).expand(self.G, -1)
            return pairs, pairs
        generator = torch.Generator().manual_seed(self.seed)
        row_keys, column_keys = (
            torch.randint(self.classes, (self.G, size), generator=generator) for size in (self.n, self.K)
        )
        column_keys[:, ::5] = -1
        if self.first is not None:
            row_keys = column_keys[:, self.first : self.first + self.n]
        return row_keys, column_keys

    def settings(self, backend):
        return general.Settings(backend, self.normalize, self.cross, -1 if self.first is None else self.first)

    def call(self, backend, tau, rows, columns):
        """The outputs of the operation, without the count."""
        return general.rectangle(self.settings(backend), tau, self.keys(), rows, columns)[:4]

    def formula(self, tau, rows, columns):
        """The same outputs, computed from the matrix of similarities in the dtype of the rows."""
        S, *which = self.parts(tau, rows, columns)
        negative, positive = (x.to(S.device) for x in which)
        neg = S.masked_fill(~negative, -torch.inf).logsumexp(-1)
        if self.first is None:
            outputs = [neg, torch.zeros_like(neg)]
        else:
            i = torch.arange(self.n)
            exists = self.exists() & (torch.arange(self.A)[:, None] != torch.arange(self.C))
            outputs = [neg, S[..., i, i + self.first].masked_fill(~exists[:, :, None].to(S.device), 0)]
        if not self.classes:
            return outputs
        count = positive.sum(-1, keepdim=True).clamp(min=1)
        mean = (S.masked_fill(~positive, 0) / count).sum(-1, keepdim=True)
        spread = (S - mean).masked_fill(~positive, -torch.inf).logsumexp(-1)
        few = positive.sum(-1) < 2
        return [*outputs, S.masked_fill(~positive, -torch.inf).logsumexp(-1), spread.where(~few, 0 * mean[..., 0])]

    def parts(self, tau, rows, columns):
        """S [G, A, C, n, K], and which candidates are negatives and positives."""
        r, z = (torch.stack(x, 1) for x in (rows or columns, columns))
        if self.normalize:
            r, z = (F.normalize(x, dim=-1, eps=1e-300 if x.dtype == torch.float64 else 1e-30) for x in (r, z))
        S = torch.einsum("gaid,gckd->gacik", r, z) / tau
        same = torch.zeros(self.n, self.K, dtype=torch.bool)
        if self.first is not None:
            same[torch.arange(self.n), torch.arange(self.n) + self.first] = True
        row_keys, column_keys = self.keys()
        like = torch.zeros(self.G, self.n, self.K, dtype=torch.bool)
        if self.classes:
            like = (row_keys[:, :, None] == column_keys[:, None]) & (row_keys[:, :, None] >= 0)
        exists = self.exists()[:, :, None, None]
        itself = same & torch.eye(self.A, self.C, dtype=torch.bool)[:, :, None, None]
        like = like[:, None, None]
        return S, ~(same | like) & exists, like & ~itself & exists

    def exists(self):
        half = (self.A + 1) // 2
        a, c = torch.arange(self.A) >= half, torch.arange(self.C) >= half
        return a[:, None] != c if self.cross else torch.ones(self.A, self.C, dtype=torch.bool)


def run(call, sets, tau, only=OUTPUTS, wanted=("rows", "columns", "tau")):
    """The outputs, and the gradients of a weighted sum of the finite entries of those named in `only`.

    wanted: the inputs for which gradients are computed.
    """
    sides = [
        [x.detach().requires_grad_(name in wanted) for x in side]
        for name, side in zip(("rows", "columns"), sets, strict=True)
    ]
    tau = torch.tensor(tau, dtype=torch.float64, requires_grad="tau" in wanted)
    outputs = call(tau, *sides)
    total = 0
    for k, x in enumerate(outputs):
        if OUTPUTS[k] in only:
            weights = oracle.some_gradient(x.shape, k).to(x.device)
            total = total + (x.double().masked_fill(~x.isfinite(), 0) * weights).sum()
    inputs = [x for x in (*sides[0], *sides[1], tau) if x.requires_grad]
    return [x.detach() for x in outputs], torch.autograd.grad(total, inputs)


PROBLEMS = {
    "rectangle": Problem(2, n=5, K=7),
    "one row": Problem(3, n=1, K=16, D=9),
    "one column": Problem(1, n=9, K=1),
    "few rows, many columns": Problem(1, n=3, K=700, D=17),
    "many rows, few columns": Problem(1, n=300, K=5, D=33),
    "ragged": Problem(2, n=131, K=203, D=65),
    "sets": Problem(2, A=3, n=9, C=3, K=9, first=0),
    "range": Problem(2, A=2, n=4, C=2, K=11, first=3),
    "range of many": Problem(1, A=2, n=70, C=2, K=150, D=40, first=67),
    "range, cross": Problem(1, A=4, n=5, C=4, K=8, first=2, cross=True),
    "plain dot products": Problem(1, n=20, K=30, normalize=False),
    "keys": Problem(2, n=15, K=27, classes=4),
    "keys, every pair positive": Problem(1, n=6, K=4, classes=1),
    "keys, many": Problem(1, n=140, K=230, D=33, classes=40),
    "keys of a range": Problem(2, A=2, n=6, C=2, K=14, first=5, classes=3),
    "keys of a range, cross": Problem(1, A=3, n=6, C=3, K=14, first=8, classes=3, cross=True),
    "keys of sets": Problem(2, A=2, n=21, C=2, K=21, first=0, classes=6, symmetric=True),
    "keys of sets, cross": Problem(1, A=4, n=10, C=4, K=10, first=0, classes=3, cross=True, symmetric=True),
    "keys of one set": Problem(1, n=190, K=190, D=32, first=0, classes=70, symmetric=True),
    "keys, plain dot products": Problem(1, n=33, K=33, first=0, classes=5, normalize=False, symmetric=True),
}
EVERY = [name for name in PROBLEMS if not INTERPRETED or PROBLEMS[name].n * PROBLEMS[name].K < 1000]


@pytest.mark.parametrize("name", EVERY)
def test_outputs_and_gradients_equal_those_of_the_formula(name, float64):
    problem = PROBLEMS[name]
    sets = problem.sets()
    outputs, grads = run(functools.partial(problem.call, float64), sets, 0.3)
    wanted, wanted_grads = run(problem.formula, sets, 0.3)
    for found, want in zip((*outputs, *grads), (*wanted, *wanted_grads), strict=True):
        assert oracle.error(found, want) <= 1e-12 * largest(want)


def judge(problem, tau, dtype, backend, only=OUTPUTS):
    """Asserts the accuracy criteria of `oracle.judge` for all outputs, and the gradient of those named in `only`."""
    sets = problem.sets(dtype)
    outputs, grads = run(functools.partial(problem.call, backend), sets, tau, only)
    wanted, wanted_grads = run(problem.formula, [[x.double() for x in side] for side in sets], tau, only)
    rounds = backend in oracle.FLOAT16_UNIT_ROWS or (sets[1][0].is_cuda and backend == "native")
    carried = problem.normalize and dtype.itemsize == 2 and rounds
    wide = torch.promote_types(dtype, torch.float32)
    eager = [[(oracle.float16_unit(x.to(wide)) if carried else x.to(wide)) for x in side] for side in sets]
    _, eager_grads = run(problem.formula, eager, tau, only)
    longest = max(x.double().norm(dim=-1).max().item() for side in sets for x in side)
    reach = (1 if problem.normalize else longest**2) / tau
    bound = oracle.loss_bound(dtype, carried, problem.D) * max(1, 0.1 * reach)
    for name, found, want in zip(OUTPUTS, outputs, wanted, strict=False):
        off = (oracle.differences(found, want) / want.abs().clamp(min=1).nan_to_num(posinf=1)).max().item()
        assert off <= bound, f"{name} is off by {off:.1e}, the limit is {bound:.1e}"
    for k, gradients in enumerate(zip(grads[:-1], wanted_grads[:-1], eager_grads[:-1], strict=True)):
        oracle.judge_gradient(*gradients, reach, f"the gradient of input {k}")
    slope, want = grads[-1].item(), wanted_grads[-1].item()  # it is a sum of many numbers of both signs
    assert abs(slope - want) <= oracle.GRADIENT[dtype] * max(1, 0.01 * reach) * slope_size(problem, sets, tau, only)


def slope_size(problem, sets, tau, only):
    """The sum of the absolute values of the summands of tau's gradient."""
    one = problem._replace(normalize=False)
    z = [[x.double() for x in side] for side in sets]
    if problem.normalize:
        z = [[F.normalize(x, dim=-1, eps=1e-300) for x in side] for side in z]
    _, grads = run(one.formula, z, tau, only)
    return sum((x * g).sum(-1).abs().sum().item() for x, g in zip((*z[0], *z[1]), grads, strict=False)) / tau + 1e-30


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_every_dtype_meets_the_accuracy_criteria(name, dtype, kernels):
    judge(PROBLEMS[name], 0.1, dtype, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [10.0, 0.01, 0.001])
@pytest.mark.parametrize("name", ["ragged", "range", "keys", "keys of sets", "keys, plain dot products"])
def test_extreme_temperatures_meet_the_accuracy_criteria(name, tau, dtype, kernels):
    judge(PROBLEMS[name]._replace(n=min(PROBLEMS[name].n, 33)), tau, dtype, kernels)


@pytest.mark.parametrize("rho, tau", [(0.9, 0.1), (0.9, 0.01), (0.999, 0.1)])
@pytest.mark.parametrize("only", ["neg", "pos_lse", "spread"])
def test_confident_classes_of_two_meet_the_accuracy_criteria(only, rho, tau, kernels):
    """The gradient of the spread has the right direction, which that of a log-sum-exp minus a mean would not have."""
    pairs = Problem(1, n=66, K=66, D=48, first=0, classes=-1, symmetric=True, rho=rho)
    judge(pairs, tau, torch.float32, kernels, (only,))


def test_a_spread_of_one_positive_is_exactly_zero(backend):
    problem = Problem(1, n=40, K=40, first=0, classes=-1, symmetric=True, rho=0.9)
    outputs, grads = run(functools.partial(problem.call, backend), problem.sets(torch.float32), 0.01, ("spread",))
    assert not outputs[3].any() and not any(g.any() for g in grads)


SHARES = [4], [3, 3], [5, 1, 3], [4, 0, 2], [7, 2, 1, 3]


def ranges(shares):
    return [(sum(shares[:r]), n) for r, n in enumerate(shares)]


def agree(call, other, inputs, tolerance):
    """Asserts that two functions have the same outputs, and the same gradients of their finite entries."""
    results = []
    for function in (call, other):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*inputs)
        finite = [x.masked_fill(~x.isfinite(), 0) for x in outputs]
        total = sum((x * oracle.some_gradient(x.shape, k)).sum() for k, x in enumerate(finite))
        results.append([*outputs, *torch.autograd.grad(total, inputs)])
    for found, want in zip(*results, strict=True):
        assert oracle.error(found, want) <= tolerance * largest(want)


def largest(x):
    """The largest absolute value of the finite entries, at least 1."""
    return max(1, x.masked_fill(~x.isfinite(), 0).abs().max().item())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("V, cross", [(1, False), (2, False), (3, False), (2, True), (4, True)])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_ranges_of_anchors_together_equal_the_whole(shares, V, cross, labelled, float64):
    N = sum(shares)
    sets = oracle.correlated([(2, N, 6)] * V, 0.5, 0)
    keys = torch.arange(N).clamp(max=2 * N // 3) - 1 if labelled else None

    def call(rows, tau, *sets):
        parts = [tk.gram(sets, tau, cross=cross, rows=part, keys=keys, backend=float64) for part in rows]
        return [torch.cat(x, -1) for x in zip(*parts, strict=True)]

    whole, together = (functools.partial(call, rows) for rows in ([None], ranges(shares)))
    agree(together, whole, [torch.tensor(0.3, dtype=torch.float64), *sets], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_the_coefficients_of_all_anchors_give_the_gradient_of_a_range_of_rows(shares, labelled, dtype, backend):
    """With several processes, a rank computes its gradient this way, from the results and gradients of all anchors."""
    N, V = sum(shares), 2
    sets = [x.to(dtype).requires_grad_() for x in oracle.correlated([(2, N, 6)] * V, 0.5, 0)]
    keys = (torch.arange(N) // 2).expand(2, -1) if labelled else None
    settings = general.Settings(backend, True, False, 0)
    outputs = general.rectangle(settings, 0.3, (keys, keys), [], sets)
    upstream = [oracle.some_gradient(x.shape, k).masked_fill(~x.isfinite(), 0) for k, x in enumerate(outputs[:4])]
    total = sum((x.masked_fill(~x.isfinite(), 0) * g).sum() for x, g in zip(outputs, upstream, strict=False))
    wanted = torch.autograd.grad(total, sets)

    sets, outputs = [x.detach() for x in sets], [x.detach() for x in outputs]
    all_anchors = [outputs[0], *upstream[:2]]
    if labelled:
        all_anchors += [outputs[2], *upstream[2:4], outputs[4]]
    for o, n in ranges(shares):
        own = [x[..., o : o + n] for x in all_anchors]
        rows, row_keys = [x[:, o : o + n] for x in sets], None if keys is None else keys[:, o : o + n]
        backward = backends.BACKENDS[backend].rectangle_backward
        found, none, _ = backward(rows, sets, 0.3, True, False, o, row_keys, keys, own, all_anchors, True, False)
        assert not none
        for f, w in zip(found, wanted, strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            assert f.shape == rows[0].shape and (n == 0 or oracle.error(f, w[:, o : o + n]) <= tolerance * largest(w))


@pytest.mark.parametrize("name", ["rectangle", "few rows, many columns", "range", "keys", "keys of a range"])
def test_gradients_of_one_side_alone_equal_those_of_both(name, backend):
    """If columns need no gradient, the forward may already compute what that of the rows needs."""
    problem = PROBLEMS[name]
    sets = problem.sets(torch.float32)
    call = functools.partial(problem.call, backend)
    outputs, grads = run(call, sets, 0.1)
    rows = len(sets[0])
    for wanted, part in [(("rows", "tau"), (*grads[:rows], grads[-1])), (("columns",), grads[rows:-1])]:
        found, some = run(call, sets, 0.1, wanted=wanted)
        for f, w in zip((*found, *some), (*outputs, *part), strict=True):
            assert oracle.error(f, w) <= 2e-5 * largest(w)
    (slope,) = run(call, sets, 0.1, wanted=("tau",))[1]
    assert slope.item() == pytest.approx(grads[-1].item(), rel=1e-4)


@pytest.mark.parametrize("labelled", [False, True])
def test_columns_shared_by_all_groups_equal_repeated_columns(labelled, float64):
    rows, columns = oracle.correlated([(2, 3, 5, 4)], 0.5, 0)[0], oracle.correlated([(6, 4)], 0.5, 1)[0]
    settings = dict(temperature=0.3, backend=float64)
    if labelled:
        settings |= dict(row_keys=torch.tensor([0, 1, 2, -1, 1]), column_keys=torch.tensor([0, 0, 1, 1, -1, 5]))

    def shared(rows, columns):
        found = tk.rectangle(rows, columns, **settings)
        return found[:3] if labelled else [found]

    def repeated(rows, columns):
        return shared(rows, columns.expand(2, 3, 6, 4))

    agree(shared, repeated, [rows, columns], 1e-12)


@pytest.mark.parametrize("columns", [None, "shared", "own"])
def test_pair_sum_equals_the_printed_formula(columns, float64):
    rows = oracle.correlated([(2, 7, 5)], 0.5, 0)[0]
    others = [] if columns is None else oracle.correlated([(9, 5) if columns == "shared" else (2, 9, 5)], 0.5, 1)
    row_keys = torch.tensor([0, 1, 0, -1, 0, 1, -1])
    column_keys = row_keys if columns is None else torch.tensor([0, 0, -1, 1, 1, 1, 4, -1, 0])
    negatives = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def call(tau, negatives, rows, *others):
        keys = dict(row_keys=row_keys) if columns is None else dict(row_keys=row_keys, column_keys=column_keys)
        return [tk.pair_sum(negatives, rows, *others, temperature=tau, **keys, backend=float64)]

    def printed(tau, negatives, rows, *others):
        sums = torch.zeros(2, 7, dtype=torch.float64)
        z = (others[0] if others else rows).expand(2, -1, -1)
        for g, i, j in itertools.product(range(2), range(7), range(len(column_keys))):
            if row_keys[i] == column_keys[j] >= 0 and not (columns is None and i == j):
                term = F.softplus(negatives[g, i] - oracle.sim(rows[g, i], z[g, j], tau))
                sums = sums + term * F.one_hot(torch.tensor(7 * g + i), 14).view(2, 7)
        return [sums]

    agree(call, printed, [torch.tensor(0.3, dtype=torch.float64), negatives, rows, *others], 1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_pair_sum_is_accurate_in_every_dtype(dtype, tau, kernels):
    problem = Problem(1, n=60, K=60, D=40, first=0, classes=7, symmetric=True, rho=0.9)
    (rows,), keys = problem.sets(dtype)[1], problem.keys()[0]
    results = []
    for x, backend in ((rows, kernels), (rows.double(), "reference")):
        x = x.detach().requires_grad_()
        negatives = tk.gram([x], tau, keys=keys, backend=backend).neg[:, 0, 0]
        sums = tk.pair_sum(negatives, x, temperature=tau, row_keys=keys, backend=backend)
        results.append((sums.detach(), torch.autograd.grad(sums.sum(), x)[0].double()))
    (found, grad), (want, want_grad) = results
    rough = kernels in oracle.FLOAT16_UNIT_ROWS and dtype.itemsize == 2
    assert oracle.error(found, want) <= (1e-3 if rough else 1e-5) * max(1, 0.1 / tau) * largest(want)
    assert oracle.error(grad, want_grad) <= oracle.GRADIENT[dtype] * max(1, 0.01 / tau) * want_grad.abs().max()


@pytest.mark.parametrize("name", ["rectangle", "keys of sets", "range"])
def test_gradients_equal_finite_differences(name, float64):
    problem = PROBLEMS[name]._replace(G=1, D=2)
    rows, columns = problem.sets()
    tau = torch.tensor(0.4, dtype=torch.float64)

    def call(tau, *sets):
        outputs = problem.call(float64, tau, list(sets[: len(rows)]), list(sets[len(rows) :]))
        return tuple(x.masked_fill(~x.isfinite(), 0) for x in outputs if x.requires_grad)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (tau, *rows, *columns)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_negatives_have_loss_and_gradient_zero(dtype, backend):
    """In the first group, every row has negatives. In the second, all labels are equal, so no row has any."""
    sets = [x.to(dtype).requires_grad_() for x in oracle.correlated([(2, 4, 5)] * 2, 0.5, 0)]
    keys = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    found = tk.gram(sets, keys=keys, backend=backend)
    assert (found.neg[1] == -math.inf).all() and not found.term[1].any()
    assert found.neg[0].isfinite().all() and (found.term[0, 0, 1] > 0).all()
    grads = torch.autograd.grad(found.term.sum(), sets, retain_graph=True)
    assert all(not g[1].any() and g[0].any() for g in grads)
    kept = torch.autograd.grad(found.pos_lse[1].sum() + found.spread[1].sum(), sets)
    assert all(g[1].any() and g.isfinite().all() for g in kept)


def test_unlabelled_rows_have_no_positives(backend):
    z = oracle.correlated([(1, 6, 5)], 0.5, 0)[0].float()
    none = tk.gram([z], keys=torch.full((6,), -1), backend=backend)
    assert (none.pos_lse == -math.inf).all() and not none.count.any() and not none.spread.any()
    torch.testing.assert_close(none.neg, tk.gram([z], backend=backend).neg)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_row_that_is_not_finite_affects_only_its_group(classes, backend):
    problem = Problem(3, n=9, K=20, D=33, classes=classes)
    rows, columns = problem.sets(torch.float32)
    whole, whole_grads = run(functools.partial(problem.call, backend), (rows, columns), 0.1)
    for side, value in itertools.product((rows, columns), (math.nan, math.inf)):
        before = side[0][1, 4, 2].item()
        side[0][1, 4, 2] = value
        outputs, grads = run(functools.partial(problem.call, backend), (rows, columns), 0.1)
        side[0][1, 4, 2] = before
        for found, want in zip((*outputs, *grads[:2]), (*whole, *whole_grads[:2]), strict=True):
            assert torch.equal(found[[0, 2]], want[[0, 2]])
        assert outputs[0][1].isnan().any()


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_very_short_and_very_long_rows_meet_the_accuracy_criteria(scale, kernels):
    judge(Problem(2, n=9, K=20, D=33, classes=3, scale=scale), 0.1, torch.float32, kernels)


def test_zero_rows_have_similarity_and_gradient_zero(backend):
    problem = Problem(2, n=5, K=8, classes=2)
    rows, columns = problem.sets(torch.float32)
    rows[0][:, 1], columns[0][:, 2] = 0, 0
    outputs, grads = run(functools.partial(problem.call, backend), (rows, columns), 0.1)
    wanted, _ = run(problem.formula, [[x.double() for x in side] for side in (rows, columns)], 0.1)
    assert all(oracle.error(f, w) < 1e-5 for f, w in zip(outputs, wanted, strict=True))
    assert not grads[0][:, 1].any() and not grads[1][:, 2].any() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_zero_rows_have_gradient_zero_beside_columns_without_gradient(dtype, backend):
    """Then the gradient of the rows is computed from the columns' mean, in PyTorch."""
    rows, columns, tau = torch.randn(3, 6).to(dtype), torch.randn(8, 6).to(dtype), torch.tensor(0.1, requires_grad=True)
    found, wanted = torch.cat([rows, torch.zeros_like(rows)[:1]]).requires_grad_(), rows.requires_grad_()
    found_grads, wanted_grads = (
        torch.autograd.grad(tk.rectangle(x, columns, tau, backend=backend).sum(), (x, tau)) for x in (found, wanted)
    )
    assert not found_grads[0][3].any() and torch.equal(found_grads[0][:3], wanted_grads[0])
    torch.testing.assert_close(found_grads[1], wanted_grads[1])


def test_the_cost_of_several_log_sum_exps_keeps_its_digits():
    """Compared with a sum of 60 digits; the gradients with shares of the sum, to the rounding of the largest share."""
    values = -math.inf, -700.0, -40.0, -1e-3, 0.0, 30.0, 41.0, 700.0
    for negatives, positive in itertools.product(itertools.product(values, repeat=3), (-20.0, 3.0)):
        leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (*negatives, positive)]
        found = general.cost(leaves[:3], leaves[3])
        with decimal.localcontext(prec=60):
            parts = [decimal.Decimal(x - positive).exp() for x in negatives]
            total = 1 + sum(parts)
            wanted = [float(total.ln()), *(float(x / total) for x in parts), -float(sum(parts) / total)]
        results = torch.stack([found, *torch.autograd.grad(found, leaves)])
        torch.testing.assert_close(results, torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=3e-16)


def test_empty_ranges_and_no_groups_give_empty_outputs(backend):
    z = [torch.randn(2, 5, 3, requires_grad=True) for _ in range(2)]
    found = tk.gram(z, rows=(3, 0), keys=torch.arange(5), backend=backend)
    assert all(x.shape == (2, 2, 2, 0) for x in found)
    grads = torch.autograd.grad(sum(x.sum() for x in found), z, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    assert tk.gram([torch.empty(0, 5, 3)], rows=(1, 2), backend=backend).neg.shape == (0, 1, 1, 2)


@pytest.mark.parametrize("name", ["rectangle", "range", "keys of sets"])
def test_second_derivatives_are_errors_except_on_the_reference(name, kernels):
    rows, columns = PROBLEMS[name].sets()
    sets = [x.requires_grad_() for x in (*rows, *columns)]
    out = PROBLEMS[name].call(kernels, 0.3, sets[: len(rows)], sets[len(rows) :])[0]
    (grad,) = torch.autograd.grad(out[out.isfinite()].sum(), sets[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative.*backend="reference"'):
        grad.sum().backward()


@pytest.mark.parametrize("of", ["rectangle", "pair_sum"])
def test_errors_of_forward_mode_and_vmap_name_the_backend(of, kernels):
    z, keys = torch.randn(4, 3), torch.arange(4) // 2

    def call(z):
        if of == "rectangle":
            return tk.rectangle(z, z, backend=kernels)
        return tk.pair_sum(z[:, 0], z, row_keys=keys, backend=kernels)

    with pytest.raises(NotImplementedError, match=f"forward mode .* not provided by backend '{kernels}'"):
        torch.func.jvp(call, (z,), (z,))
    with pytest.raises(NotImplementedError, match=f"vmap is not provided by backend '{kernels}'"):
        torch.vmap(call)(z[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_a_row_in_a_range_is_rounded_once(dtype, backend):
    """For short rows, the gradients as anchor and as candidate overflow float16 and may have opposite signs."""
    z = torch.randn(200, 2, 4, 8)
    z[:, :, 0] *= torch.logspace(0, -5, 200)[:, None, None]
    grads = []
    for rows in (None, (0, 4)):
        sets = [x.to(dtype).requires_grad_() for x in z.unbind(1)]
        tk.gram(sets, 0.05, rows=rows, backend=backend).term.sum().backward()
        grads.append(torch.stack([x.grad for x in sets]))
    assert not grads[1].isnan().any()
    torch.testing.assert_close(grads[1], grads[0], rtol=1.1 * torch.finfo(dtype).eps, atol=1e-3)


LABELS = torch.arange(5)
WRONG = {
    "sets: found a tensor": lambda z: tk.gram(z),
    r"sets\[0\] has shape \[2, 5, 3\] and sets\[1\] \[2, 4, 3\]": lambda z: tk.gram([z, z[:, :4]]),
    r"sets\[0\]: found 2 dimensions": lambda z: tk.gram([z[0]]),
    r"rows: found \(4, 2\), wanted two integers": lambda z: tk.gram([z], rows=(4, 2)),
    "rows: found 3, wanted two integers": lambda z: tk.gram([z], rows=3),
    r"rows: found \(False, True\), wanted two integers": lambda z: tk.gram([z], rows=(False, True)),
    r"keys: found shape \[4\], wanted integers of shape \[5\] or \[2, 5\]": lambda z: tk.gram([z], keys=LABELS[1:]),
    "keys: found dtype torch.float32": lambda z: tk.gram([z], keys=torch.ones(5)),
    "keys: found dtype torch.uint64, wanted int64": lambda z: tk.gram([z], keys=LABELS.to(torch.uint64)),
    "keys: found 3": lambda z: tk.gram([z], keys=3),
    "cross: found 1": lambda z: tk.gram([z], cross=1),
    "temperature: found 0": lambda z: tk.gram([z], 0),
    "rows: found an empty tensor": lambda z: tk.rectangle(z[:, :0], z),
    r"columns: found shape \[3, 5, 3\], wanted \[K, 3\] or \[2, K, 3\]": lambda z: tk.rectangle(z, z[[0, 0, 0]]),
    "columns: found None, wanted a torch.Tensor": lambda z: tk.rectangle(z, None),
    r"columns: found shape \[5, 2\]": lambda z: tk.rectangle(z, z[0, :, :2]),
    "rows has dtype torch.float32 and columns torch.float64": lambda z: tk.rectangle(z, z.double()),
    "column_keys: found None": lambda z: tk.rectangle(z, z, row_keys=LABELS),
    "row_keys: found None": lambda z: tk.rectangle(z, z, column_keys=LABELS),
    r"row_keys: found shape \[2\]": lambda z: tk.rectangle(z, z, row_keys=LABELS[:2], column_keys=LABELS),
    "column_keys: found a tensor without columns": lambda z: tk.pair_sum(
        z[..., 0], z, row_keys=LABELS, column_keys=LABELS
    ),
    r"negatives: found shape \[2\], wanted a floating-point tensor of shape \[2, 5\]": lambda z: tk.pair_sum(
        z[:, 0, 0], z, row_keys=LABELS
    ),
    "row_keys: found None, wanted": lambda z: tk.pair_sum(z[..., 0], z, row_keys=None),
    "backend: found 'cuda'": lambda z: tk.rectangle(z, z, backend="cuda"),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_wrong_arguments(message):
    with pytest.raises((ValueError, TypeError), match=message):
        WRONG[message](torch.randn(2, 5, 3))


def test_the_example_in_the_documentation_equals_the_printed_formula(float64):
    page = (Path(__file__).parents[1] / "docs/operation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)

    def printed(a, b):
        views, terms = [a, b], []
        for v, i in itertools.product(range(2), range(len(a))):
            S = [[oracle.sim(views[v][i], z, 0.1) for z in view] for view in views]
            negatives = [S[c][j] for c in range(2) for j in range(len(a)) if j != i]
            terms.append(torch.stack(negatives).logsumexp(0) - S[1 - v][i])
        return [torch.stack(terms).mean()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLR_KERNELS_BACKEND", float64)
        agree(lambda a, b: [names["dcl"](a, b)], printed, oracle.correlated([(5, 4)] * 2, 0.5, 0), 1e-12)
