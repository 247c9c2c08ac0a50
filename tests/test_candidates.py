"""Losses with labels, further negatives and `decoupled`, for every combination of these arguments.

Values and all gradients equal those of the printed formulas to 1e-12 in float64.
"""

import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tclr_kernels as tk

from . import oracle
from .oracle import run

N, D = 5, 4
LABELS = torch.tensor([3, 0, -1, 0, 3])  # -1 is no label
ALIKE = torch.zeros(N, dtype=torch.int64)
GROUPS = {"one": (), "two groups": (2,)}
BOOLS = False, True
EACH = dict(reduction="none")


def tensors(leading=(), K=3, own=True, n=2):
    """n inputs [..., N, D], and further negatives for each group (`own`) or for all groups."""
    shapes = [(*leading, N, D)] * n + [((*leading, K, D) if own else (K, D))]
    return oracle.correlated(shapes, 0.5, 0)


def agree(found, wanted, inputs):
    """Asserts that two functions of (temperature, *inputs) have the same values and gradients."""
    inputs = [torch.tensor(0.3, dtype=torch.float64), *inputs]
    (out, grads), (want, want_grads) = (
        run(call, inputs, oracle.some_gradient(wanted(*inputs).shape)) for call in (found, wanted)
    )
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)


def by_group(loops, leading):
    """Applies a formula for one group to each group. A tensor of two dimensions belongs to every group."""
    if not leading:
        return loops
    return lambda *z: torch.stack([loops(*(x if x.dim() == 2 else x[g] for x in z)) for g in range(leading[0])])


combinations = [
    pytest.param(dict(labels=labels, further=further, decoupled=decoupled), id=f"{name}-{further}-{decoupled}")
    for (name, labels), further, decoupled in itertools.product(
        (("none", None), ("labels", LABELS), ("alike", ALIKE)), ("no", "of all", "own"), BOOLS
    )
]


@pytest.mark.parametrize("leading", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("symmetric", BOOLS)
@pytest.mark.parametrize("case", combinations)
def test_nt_xent_equals_its_printed_formula(case, symmetric, leading, float64):
    labels, decoupled, further = case["labels"], case["decoupled"], case["further"] != "no"

    def loss(tau, a, b, q):
        settings = dict(symmetric=symmetric, labels=labels, decoupled=decoupled, negatives=q if further else None)
        return tk.nt_xent(a, b, tau, **settings, **EACH, backend=float64) + 0 * q.sum()

    def formula(tau, a, b, q):
        def one(a, b):
            sim = functools.partial(oracle.sim, tau=tau)
            return oracle.among_loops(a, b, sim, labels, q if further else (), decoupled=decoupled)

        return torch.cat([one(a, b), one(b, a)]) if symmetric else one(a, b)

    inputs = tensors(leading, own=case["further"] == "own")
    agree(loss, lambda tau, *z: by_group(functools.partial(formula, tau), leading)(*z) + 0 * z[-1].sum(), inputs)


@pytest.mark.parametrize("leading", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)], ids=["both", "a", "b"])
@pytest.mark.parametrize("case", combinations)
def test_clip_loss_equals_its_printed_formula(case, sides, leading, float64):
    labels, decoupled = case["labels"], case["decoupled"]
    of = [case["further"] != "no" and side for side in sides]

    def loss(tau, a, b, q):
        settings = dict(labels=labels, decoupled=decoupled, negatives=tuple(q if x else None for x in of))
        return tk.clip_loss(a, b, tau, **settings, **EACH, backend=float64) + 0 * q.sum()

    def formula(tau, a, b, q):
        sim = functools.partial(oracle.sim, tau=tau)
        call = functools.partial(oracle.among_loops, sim=sim, labels=labels, own=False, decoupled=decoupled)
        return torch.cat([call(*z, further=q if x else ()) for z, x in zip(((a, b), (b, a)), of, strict=True)])

    inputs = tensors(leading, own=case["further"] == "own")
    agree(loss, lambda tau, *z: by_group(functools.partial(formula, tau), leading)(*z) + 0 * z[-1].sum(), inputs)


@pytest.mark.parametrize("leading", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("in_batch", BOOLS)
@pytest.mark.parametrize("case", combinations)
def test_info_nce_equals_its_printed_formula(case, in_batch, leading, float64):
    labels, decoupled, further = case["labels"], case["decoupled"], case["further"] != "no"
    if not in_batch and (labels is not None or not further):
        return  # an error, see SETTING_FAULTS

    def loss(tau, q, k, x):
        settings = dict(labels=labels, decoupled=decoupled, negatives=x if further else None, in_batch=in_batch)
        return tk.info_nce(q, k, tau, **settings, **EACH, backend=float64) + 0 * x.sum()

    def formula(tau, q, k, x):
        sim = functools.partial(oracle.sim, tau=tau)
        settings = dict(own=False, in_batch=in_batch, decoupled=decoupled)
        return oracle.among_loops(q, k, sim, labels, x if further else (), **settings)

    inputs = tensors(leading, own=case["further"] == "own")
    agree(loss, lambda tau, *z: by_group(functools.partial(formula, tau), leading)(*z) + 0 * z[-1].sum(), inputs)


@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("softmax", ["pairs", "joint"])
@pytest.mark.parametrize("case", [case for case in combinations if case.values[0]["further"] != "own"])
def test_instance_contrastive_equals_its_printed_formula(case, softmax, V, float64):
    labels, decoupled, further = case["labels"], case["decoupled"], case["further"] != "no"

    def loss(tau, q, *views):
        settings = dict(labels=labels, decoupled=decoupled, negatives=q if further else None, softmax=softmax)
        return tk.instance_contrastive(views, tau, **settings, **EACH, backend=float64) + 0 * q.sum()

    def formula(tau, q, *views):
        sim = functools.partial(oracle.sim, tau=tau)
        rest = dict(labels=labels, further=q if further else (), decoupled=decoupled)
        if softmax == "joint":
            return oracle.joint_loops(torch.stack(views), sim, **rest) + 0 * q.sum()
        pairs = [
            oracle.among_loops(a, c, sim, **rest) if a is not c else torch.zeros(N, dtype=torch.float64)
            for a, c in itertools.product(views, views)
        ]
        return torch.stack(pairs).view(V, V, N) + 0 * q.sum()

    *views, q = tensors(n=V)
    agree(loss, formula, [q, *views])


@pytest.mark.parametrize("leading", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("labels", [LABELS, ALIKE, torch.full((N,), -1), torch.arange(N)], ids=str)
@pytest.mark.parametrize("normalize", BOOLS)
def test_sup_con_equals_its_printed_formula(labels, normalize, leading, float64):
    def loss(tau, z):
        return tk.sup_con(z, labels, tau, normalize=normalize, **EACH, backend=float64)

    def formula(tau, z):
        sim = functools.partial(oracle.sim, tau=tau, normalize=normalize)
        return by_group(lambda z: oracle.sup_con_loops(z, labels, sim), leading)(z)

    agree(loss, formula, oracle.correlated([(*leading, N, D)], 0.5, 0))


@pytest.mark.parametrize("form", ["paper", "release"])
@pytest.mark.parametrize("labels", [LABELS, ALIKE], ids=["some", "alike"])
def test_labels_of_the_objective_change_both_ic_terms_only(labels, form, float64):
    """The other terms compare clips of one video, so labels do not apply to them."""
    inputs = oracle.LOSSES["tclr"].inputs((N, 2, D))

    def loss(tau, *z):
        weights = dict(ic_global=0.5, ic_local=2.0, ll=3.0, gl=0.25)
        return oracle.tclr_terms(*z, temperature=tau, form=form, weights=weights, labels=labels, backend=float64)

    def formula(tau, g, s, x):
        sim = functools.partial(oracle.sim, tau=tau)
        call = functools.partial(oracle.among_loops, sim=sim, labels=labels)
        clips = x.transpose(1, 2).flatten(0, 1)
        ic = (call(g[0], g[1]) + call(g[1], g[0])).mean() / 2
        ic_local = sum(call(a, c).sum() for a, c in itertools.permutations(clips, 2)) / (4 * N)
        _, _, ll, gl = oracle.paper_loops(g, s, x, sim)
        if form == "release":
            _, _, ll, gl = oracle.release_loops(g, s, x, sim)
        return torch.stack([0.5 * ic + 2 * ic_local + 3 * ll + 0.25 * gl, ic, ic_local, ll, gl])

    agree(loss, formula, inputs)


# ---- logit_scale, the temperature by position, views in a list


CALLS = {
    "nt_xent": lambda a, b, *tau, **s: tk.nt_xent(a, b, *tau, **s),
    "nt_xent decoupled": lambda a, b, *tau, **s: tk.nt_xent(a, b, *tau, decoupled=True, **s),
    "clip_loss": lambda a, b, *tau, **s: tk.clip_loss(a, b, *tau, **s),
    "info_nce": lambda a, b, *tau, **s: tk.info_nce(a, b, *tau, **s),
    "moco": lambda a, b, *tau, **s: tk.info_nce(a, a, *tau, negatives=b, in_batch=False, **s),
    "sup_con": lambda a, b, *tau, **s: tk.sup_con(torch.cat([a, b]), ALIKE.repeat(2), *tau, **s),
    "instance_contrastive": lambda a, b, *tau, **s: tk.instance_contrastive((a, b), *tau, **s),
    "local_local": lambda a, b, *tau, **s: tk.local_local(a[None], b[None], *tau, **s),
    "global_local": lambda a, b, *tau, **s: tk.global_local(a[None], b[None], *tau, **s),
    "tclr": lambda a, b, *tau, **s: (
        tk.tclr((a, b), [a[:, None], b[:, None]], (b[:, None], a[:, None]), *tau, **s).total
    ),
}
each = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@each
def test_logit_scale_is_one_over_the_temperature(name, shape, dtype, backend):
    """It may be a number, or a tensor, whose gradient is the derivative in the tensor's dtype."""
    a, b = (x.float() for x in tensors()[:2])
    scale = torch.full(shape, 6.1, dtype=dtype)
    exact = scale.double()
    want, (slope,) = run(lambda s: CALLS[name](a.double(), b.double(), 1 / s.reshape(()), backend="reference"), [exact])
    found, (grad,) = run(lambda s: CALLS[name](a, b, logit_scale=s, backend=backend), [scale])
    assert grad.dtype == dtype and grad.shape == shape
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-5)
    number = CALLS[name](a, b, logit_scale=exact.item(), backend=backend)
    torch.testing.assert_close(number, found)


@each
def test_logit_scale_is_exact_in_float64(name, float64):
    a, b = tensors()[:2]
    scale = torch.tensor(3.7, dtype=torch.float64)
    found, wanted = (
        run(call, [scale, a, b])
        for call in (
            lambda s, a, b: CALLS[name](a, b, logit_scale=s, backend=float64),
            lambda s, a, b: CALLS[name](a, b, 1 / s, backend=float64),
        )
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@each
def test_temperature_may_be_the_positional_argument_after_the_tensors(name, backend):
    a, b = (x.float() for x in tensors()[:2])
    given = CALLS[name](a, b, 0.3, backend=backend)
    assert torch.equal(given, CALLS[name](a, b, temperature=0.3, backend=backend))
    assert not torch.equal(given, CALLS[name](a, b, backend=backend))
    assert torch.equal(CALLS[name](a, b, 0.1, backend=backend), CALLS[name](a, b, backend=backend))


@each
def test_temperature_beside_logit_scale_and_wrong_logit_scales_are_errors(name):
    a, b = tensors()[:2]
    for wrong in (0.1, torch.tensor(0.1)):
        with pytest.raises(ValueError, match="logit_scale: found .* beside temperature .*, wanted one of them"):
            CALLS[name](a, b, wrong, logit_scale=10.0)
    for wrong in (0, -1.0, math.nan, math.inf, "3", torch.ones(2), torch.tensor(3), True, 5e-324):
        with pytest.raises((TypeError, ValueError), match="logit_scale: found"):
            CALLS[name](a, b, logit_scale=wrong)


def test_tclr_kernels_check_refuses_a_negative_logit_scale(monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="logit_scale: found -3.0"):
        tk.nt_xent(*tensors()[:2], logit_scale=torch.tensor(-3.0))


def test_a_list_of_views_equals_the_stacked_tensor(backend):
    views = [x.float() for x in tensors()[:2]]
    assert torch.equal(
        tk.instance_contrastive(views, backend=backend), tk.instance_contrastive(torch.stack(views), backend=backend)
    )
    g, s, x = oracle.LOSSES["tclr"].inputs((N, 2, D), torch.float32)
    found = tk.tclr(list(g), tuple(s), list(x), backend=backend)
    assert all(map(torch.equal, found, tk.tclr(g, s, x, backend=backend)))


@pytest.mark.parametrize(
    "views, message",
    [
        ([torch.ones(3, 2), torch.ones(2, 2)], r"views\[0\] has shape \[3, 2\] and views\[1\] \[2, 2\]"),
        ([torch.ones(3, 2), torch.ones(3, 2).double()], r"views\[0\] has dtype torch.float32 and views\[1\]"),
        ([torch.ones(3, 2), None], r"views\[1\]: found None"),
        ([None, torch.ones(3, 2)], r"views\[0\]: found None"),
        ([torch.ones(3, 2)], "views: found V = 1"),
        ([], "views: found a list"),
        ([torch.ones(3, 1, 2)] * 2, "views: found 4 dimensions"),
    ],
)
def test_errors_name_the_wrong_view_of_a_list(views, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tk.instance_contrastive(views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_negatives_of_both_sides_are_rounded_once(dtype, backend):
    """For short rows, the gradient of each side overflows float16, and the two may have opposite signs."""
    a, b, n = torch.randn(3, 100, 4, 8)
    n[:, 0] *= torch.logspace(0, -5, 100)[:, None]
    grads = []
    for to in (dtype, torch.float64):
        given = n.to(dtype).to(to).requires_grad_()
        x, y = (z.to(dtype).to(to) for z in (a, b))
        tk.clip_loss(x, y, 0.05, negatives=(given, given), reduction="sum", backend=backend).backward()
        grads.append(given.grad.to(dtype))
    assert not grads[0].isnan().any()
    torch.testing.assert_close(*grads, rtol=1.1 * torch.finfo(dtype).eps, atol=1e-3)


# ---- reductions, and rows without positives or negatives


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each
def test_mean_and_sum_equal_those_of_the_single_terms(name, reduction, backend):
    if name == "tclr":
        return
    a, b = (x.float() for x in tensors()[:2])
    one = CALLS[name](a, b, **EACH, backend=backend)
    terms = one[one != 0]  # the terms of a view with itself are 0
    found = CALLS[name](a, b, reduction=reduction, backend=backend)
    torch.testing.assert_close(found, terms.mean() if reduction == "mean" else terms.sum())


def test_rows_without_positives_are_not_counted_in_the_mean(backend):
    (z,) = oracle.correlated([(2, 6, D)], 0.5, 0)
    labels = torch.tensor([[0, 0, 1, 2, 2, 2], [3, 4, 5, -1, -1, 6]])
    each = tk.sup_con(z, labels, reduction="none", backend=backend)
    assert (each == 0).tolist() == [[False, False, True, False, False, False], [True] * 6]
    torch.testing.assert_close(tk.sup_con(z, labels, backend=backend), each.sum() / 5)
    out, (grad,) = run(lambda z: tk.sup_con(z, labels[1], backend=backend), [z[1]])
    assert out == 0 and not grad.any()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_rows_without_negatives_have_loss_and_gradient_exactly_zero(dtype, backend):
    a, b = (x.to(dtype) for x in tensors()[:2])
    for settings in (dict(labels=ALIKE), dict(labels=ALIKE, decoupled=True)):
        for call in (tk.nt_xent, tk.clip_loss, tk.info_nce):
            out, grads = run(functools.partial(call, **settings, **EACH, backend=backend), [a, b])
            assert not out.any() and not any(g.any() for g in grads)
        for softmax in ("pairs", "joint"):
            call = functools.partial(tk.instance_contrastive, softmax=softmax, **settings, **EACH, backend=backend)
            out, grads = run(lambda a, b, call=call: call([a, b]), [a, b])
            assert not out.any() and not any(g.any() for g in grads)
    out, grads = run(functools.partial(tk.nt_xent, decoupled=True, **EACH, backend=backend), [a[:1], b[:1]])
    assert not out.any() and not any(g.any() for g in grads)


def test_each_query_may_have_negatives_of_its_own(backend):
    """This is the example in docs/losses.md."""
    q, k = (x.float() for x in tensors()[:2])
    (own,) = oracle.correlated([(N, 3, D)], 0, 1)
    found = tk.info_nce(q[:, None], k[:, None], negatives=own.float(), backend=backend)
    sim = functools.partial(oracle.sim, tau=0.1)
    wanted = [oracle.among_loops(q[i : i + 1], k[i : i + 1], sim, further=own[i].float(), own=False) for i in range(N)]
    torch.testing.assert_close(found, torch.cat(wanted).mean())


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "info_nce", "instance_contrastive"])
def test_autocast_promotes_mixed_dtypes_of_rows_and_negatives(name, backend):
    a, b, q = (x.float() for x in tensors())
    call = {
        "nt_xent": lambda a, b, q: tk.nt_xent(a, b, negatives=q, backend=backend),
        "clip_loss": lambda a, b, q: tk.clip_loss(a, b, negatives=(q, None), backend=backend),
        "info_nce": lambda a, b, q: tk.info_nce(a, b, negatives=q, in_batch=False, backend=backend),
        "instance_contrastive": lambda a, b, q: tk.instance_contrastive([a, b], negatives=q, backend=backend),
    }[name]
    half = a.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(call, [half, b, q])
    assert out.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(out, call(half.float(), b, q))


def test_labels_negatives_and_scale_may_be_made_in_inference_mode(backend):
    a, b, q = (x.float() for x in tensors())
    with torch.inference_mode():
        labels, further, scale = LABELS.clone(), q.clone(), torch.tensor(5.0)
    for call, negatives in ((tk.nt_xent, further), (tk.clip_loss, (further, None)), (tk.info_nce, further)):
        settings = dict(labels=labels, negatives=negatives, logit_scale=scale, backend=backend)
        out, grads = run(functools.partial(call, **settings), [a, b])
        settings |= dict(labels=LABELS, negatives=(q, None) if call is tk.clip_loss else q, logit_scale=5.0)
        torch.testing.assert_close((out, grads), run(functools.partial(call, **settings), [a, b]))
    found, wanted = (run(functools.partial(tk.sup_con, labels=x, backend=backend), [a]) for x in (labels, LABELS))
    oracle.same_bits(found, wanted)


# ---- faults


A = torch.randn(4, 3)
GROUPED = torch.randn(2, 4, 3)
NEGATIVE_FAULTS = {  # negatives beside embeddings [2, 4, 3]
    "another width": (torch.ones(5, 2), r"found shape \[5, 2\], wanted \[K, 3\] or \[2, K, 3\] beside embeddings"),
    "other groups": (torch.ones(3, 5, 3), r"found shape \[3, 5, 3\], wanted"),
    "one dimension": (torch.ones(3), "found 1 dimensions"),
    "empty": (torch.ones(0, 3), "found an empty tensor"),
    "list": ([[1.0, 2.0, 3.0]], "found a list"),
    "integers": (torch.ones(5, 3, dtype=torch.int64), "found dtype torch.int64"),
    "another dtype": (torch.ones(5, 3).double(), "torch.float64: wanted one dtype"),
    "another device": (torch.ones(5, 3, device="meta"), "on meta: wanted one device"),
}
TAKE_NEGATIVES = {
    "nt_xent": lambda x: tk.nt_xent(GROUPED, GROUPED, negatives=x),
    "clip_loss": lambda x: tk.clip_loss(GROUPED, GROUPED, negatives=(None, x)),
    "info_nce": lambda x: tk.info_nce(GROUPED, GROUPED, negatives=x),
    "moco": lambda x: tk.info_nce(GROUPED, GROUPED, negatives=x, in_batch=False),
}


@pytest.mark.parametrize("fault", NEGATIVE_FAULTS)
@pytest.mark.parametrize("name", TAKE_NEGATIVES)
def test_errors_name_wrong_negatives(name, fault):
    wrong, message = NEGATIVE_FAULTS[fault]
    with pytest.raises((TypeError, ValueError), match=r"negatives(\[1\])?\b.*" + message) as raised:
        TAKE_NEGATIVES[name](wrong)
    assert "\n" not in str(raised.value)


def test_tclr_kernels_check_names_the_negative_that_is_not_finite(monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_CHECK", "1")
    negatives = torch.ones(5, 3)
    negatives[4, 1] = math.nan
    for call in TAKE_NEGATIVES.values():
        with pytest.raises(ValueError, match=r"negatives(\[1\])?: found a NaN or Inf in row \[4\]"):
            call(negatives)


LABEL_FAULTS = {
    "a list": ([0, 1, 2, 3], "found .0, 1, 2, 3., wanted a tensor of integers"),
    "floats": (torch.ones(4), "found dtype torch.float32"),
    "booleans": (torch.ones(4, dtype=torch.bool), "found dtype torch.bool"),
    "another size": (torch.ones(3, dtype=torch.int64), r"found shape \[3\], wanted integers of shape \[4\]"),
    "too many dimensions": (torch.ones(4, 1, dtype=torch.int64), r"found shape \[4, 1\]"),
}
TAKE_LABELS = {
    "nt_xent": lambda x: tk.nt_xent(A, A, labels=x),
    "clip_loss": lambda x: tk.clip_loss(A, A, labels=x),
    "info_nce": lambda x: tk.info_nce(A, A, labels=x),
    "sup_con": lambda x: tk.sup_con(A, x),
    "instance_contrastive": lambda x: tk.instance_contrastive([A, A], labels=x),
    "tclr": lambda x: tk.tclr([A, A], [A[:, None]] * 2, [A[:, None]] * 2, labels=x),
}


@pytest.mark.parametrize("fault", LABEL_FAULTS)
@pytest.mark.parametrize("name", TAKE_LABELS)
def test_errors_name_wrong_labels(name, fault):
    wrong, message = LABEL_FAULTS[fault]
    with pytest.raises((TypeError, ValueError), match="labels: " + message):
        TAKE_LABELS[name](wrong)


SETTING_FAULTS = {
    "negatives: found None, wanted a tensor or a NegativeQueue": lambda: tk.info_nce(A, A, in_batch=False),
    "labels: found a tensor, wanted None, since in_batch=False": lambda: tk.info_nce(
        A, A, in_batch=False, negatives=A, labels=torch.arange(4)
    ),
    "in_batch: found 1, wanted True or False": lambda: tk.info_nce(A, A, in_batch=1),
    "decoupled: found 1, wanted True or False": lambda: tk.nt_xent(A, A, decoupled=1),
    "decoupled: found None": lambda: tk.clip_loss(A, A, decoupled=None),
    "decoupled: found 'yes'": lambda: tk.info_nce(A, A, decoupled="yes", in_batch=False, negatives=A),
    "decoupled: found 0": lambda: tk.instance_contrastive([A, A], decoupled=0, softmax="joint"),
    "softmax: found 'all', wanted one of 'pairs', 'joint'": lambda: tk.instance_contrastive([A, A], softmax="all"),
    r"negatives: found a tensor of shape \[4, 3\], wanted a pair": lambda: tk.clip_loss(A, A, negatives=A),
    r"negatives: found \(None,\), wanted a pair": lambda: tk.clip_loss(A, A, negatives=(None,)),
    "labels: found None, wanted a tensor": lambda: tk.sup_con(A, None),
}


@pytest.mark.parametrize("message", SETTING_FAULTS)
def test_errors_name_wrong_settings(message):
    with pytest.raises((TypeError, ValueError), match=message):
        SETTING_FAULTS[message]()


# ---- modules


def test_values_that_change_at_every_step_are_arguments_of_a_modules_forward(backend):
    a, b, q = (x.float() for x in tensors())
    some = dict(labels=LABELS, negatives=q)
    cases = [
        (tk.NTXentLoss(0.5, decoupled=True, backend=backend), tk.nt_xent, (a, b), some, dict(decoupled=True)),
        (tk.CLIPLoss(0.5, backend=backend), tk.clip_loss, (a, b), dict(labels=LABELS, negatives=(q, None)), {}),
        (
            tk.InfoNCELoss(0.5, in_batch=False, backend=backend),
            tk.info_nce,
            (a, b),
            dict(negatives=q),
            dict(in_batch=False),
        ),
        (tk.SupConLoss(0.5, backend=backend), tk.sup_con, (a, LABELS), {}, {}),
        (
            tk.InstanceContrastiveLoss(0.5, softmax="joint", backend=backend),
            tk.instance_contrastive,
            ([a, b, a],),
            some,
            dict(softmax="joint"),
        ),
    ]
    for module, function, inputs, changing, settings in cases:
        wanted = function(*inputs, 0.5, **changing, **settings, backend=backend)
        assert torch.equal(module(*inputs, **changing), wanted)
        with pytest.raises(ValueError, match="logit_scale: found 2.0 beside temperature 0.5"):
            module(*inputs, **changing, logit_scale=2.0)
        scaled = type(module)(**settings, backend=backend)(*inputs, **changing, logit_scale=2.0)
        assert torch.equal(scaled, wanted)


def test_a_logit_scale_that_the_model_learns_gets_its_gradient(backend):
    """As in CLIP, the parameter is the logarithm of the scale, and belongs to the model."""
    a, b = (x.float() for x in tensors()[:2])
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    tk.CLIPLoss(backend=backend)(a, b, logit_scale=log_scale.exp()).backward()
    _, (slope,) = run(lambda x: tk.clip_loss(a, b, 1 / x.exp(), backend=backend), [log_scale])
    torch.testing.assert_close(log_scale.grad, slope)


# ---- the page that says which loss is which


def test_the_examples_in_the_documentation_equal_the_printed_formulas(float64, monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", float64)
    page = (Path(__file__).parents[1] / "docs/losses.md").read_text()
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    a, b, video = (names[x][..., :8] if x == "video" else names[x][:8].double() for x in ("a", "b", "video"))
    own, sim = names["own"][:8].double(), functools.partial(oracle.sim, tau=0.1)

    found = names["batch_and_own"](a, b, own)
    one = lambda i: torch.cat([a[i : i + 1], a[:i], a[i + 1 :]])  # noqa: E731  the query first
    wanted = [
        oracle.among_loops(one(i), torch.cat([b[i : i + 1], b[:i], b[i + 1 :]]), sim, further=own[i], own=False)[0]
        for i in range(8)
    ]
    torch.testing.assert_close(found, torch.stack(wanted).mean(), rtol=1e-12, atol=0)

    terms = []
    for i, j in itertools.permutations(range(8), 2):
        if video[i] == video[j]:
            negatives = sum(sim(a[i], a[n]).exp() for n in range(8) if video[n] != video[i])
            terms.append(-(sim(a[i], a[j]).exp() / (sim(a[i], a[j]).exp() + negatives)).log())
    found = names["ntxent_of_pairs"](a, video)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_losses_with_labels_equal_nt_xent_if_the_labels_are_indices(float64):
    a, b = tensors()[:2]
    wanted = tk.nt_xent(a, b, backend=float64)
    z, index = torch.cat([a, b]), torch.arange(N).repeat(2)
    torch.testing.assert_close(tk.sup_con(z, index, backend=float64), wanted, rtol=1e-12, atol=0)
    for softmax in ("pairs", "joint"):
        found = tk.instance_contrastive([a, b], softmax=softmax, backend=float64)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
