"""The checks find bugs that are planted in the reference backend and in the losses, so they would find them in kernels.

test_kernels.py, test_cuda.py and test_triton.py plant bugs in the kernels.
"""

import functools
import inspect
import sys
import types

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends, candidates, losses

from . import oracle, test_candidates, test_general

SOURCE = inspect.getsource(backends.reference)
BUGS = {
    "dropped mask": ("S.masked_fill(i[:, None] == i, -torch.inf)", "S"),
    "tile off by one": ("pos = S[:, :, :, i, i]", "pos = S.roll(1, 4)[:, :, :, i, i]"),
    "missing maximum": (".logsumexp(-1)", ".exp().sum(-1).log()"),
    "wrong power of tau": ("/ tau)", "/ tau**2)"),
    "missing factor 2": ("rows @ rows.mT", "rows @ rows.mT.detach()"),
    "swapped positive": ("F.logsigmoid(pos - negatives)", "F.logsigmoid(pos.roll(1, -1) - negatives)"),
    "own negatives forgotten": ("neg if cross else", "neg if True else"),
    "zero row divided": ("scaled.masked_fill(zero, 1)", "scaled"),
    "own blocks in cross": ("half[:, None] != half if cross", "half[:, None] != half if False"),
}

GENERAL_BUGS = {
    "a range that begins at the first row": ("i[:, None] + first == j", "i[:, None] == j"),
    "positives of another row": ("m.S[:, :, :, i, i + first]", "m.S[:, :, :, i, i]"),
    "unlabelled rows alike": (" & (row_keys >= 0)[:, :, None]", ""),
    "the anchor itself a positive": ("same_key & ~itself & self.there", "same_key & self.there"),
    "a row's other views not among its positives": (
        "itself = self.same_index & (a[:, None] == c)",
        "itself = self.same_index & (a[:, None] == a[:, None])",
    ),
    "labels forgotten among the negatives": (
        "self.left_out = self.same_index | same_key",
        "self.left_out = self.same_index",
    ),
    "a mean divided by one positive too many": ("count.clamp(min=1)", "(count + 1)"),
    "half of the columns' gradient": ("self.z.flatten(1, 2)", "(self.z / 2 + self.z.detach() / 2).flatten(1, 2)"),
    "blocks that do not exist": ("m.left_out | ~m.there", "m.left_out"),
}


CANDIDATES = inspect.getsource(candidates)
CANDIDATE_BUGS = {
    "labels forgotten": ("keys = None if labels is None else", "keys = None if True else"),
    "one set's negatives for all": ("rows = torch.stack(sets, 1)", "rows = torch.stack([sets[0]] * len(sets), 1)"),
    "all groups' negatives for each": ("1 if negatives.dim() == 2 else len(anchors)", "1"),
    "sides exchanged": ("zip(sets, negatives, strict=True)", "zip(sets, reversed(negatives), strict=True)"),
    "a row its own positive": (".masked_fill(itself, -torch.inf).logsumexp(2)", ".logsumexp(2)"),
    "the first block alone": ("blocks = [*self.neg.unbind(2),", "blocks = [*self.neg.unbind(2)[:1],"),
    "positives among the keys of others": (
        "_, pos, *_ = all_pairs(in_pairs, tau, normalize, True",
        "pos, *_ = all_pairs(in_pairs, tau, normalize, False",
    ),
    "gradients added in half precision": ("    a, b = widened(backends.choose(backend, a.device), a, b)\n", ""),
}


def backend_from(source):
    module = types.ModuleType("planted")
    exec(compile(source, "planted", "exec"), module.__dict__)
    return module


def check_losses():
    """Raises AssertionError unless values and gradients are those of the printed formulas."""
    shapes = (3, 4), (2, 3, 4)
    a, b, s, x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        for i, shape in enumerate((*shapes[:1] * 2, *shapes[1:] * 2))
    )
    pairs = [
        (tk.nt_xent, lambda u, v, sim: oracle.both_ways(oracle.nt_xent_loops, u, v, sim), a, b),
        (tk.clip_loss, lambda u, v, sim: oracle.both_ways(oracle.clip_loops, u, v, sim), a, b),
        (tk.local_local, oracle.local_local_loops, s, x),
        (tk.global_local, oracle.global_local_loops, s, x),
    ]
    for function, loops, u, v in pairs:
        wanted = oracle.run(lambda u, v, loops=loops: loops(u, v, lambda p, q: oracle.sim(p, q, 0.3)), [u, v])
        found = oracle.run(function, [u, v], temperature=0.3, reduction="none", backend="reference")
        for f, w in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            assert oracle.error(f, w) < 1e-12
    g, s, x = torch.stack([a[:2], b[:2]]), torch.stack([s, x]), torch.stack([x, s + 1])
    gl = oracle.paper_loops(g, s, x, lambda p, q: oracle.sim(p, q, 0.3))[3]
    terms = tk.tclr(g, s, x, temperature=0.3, backend="reference")
    assert oracle.error(terms.gl, gl) < 1e-12
    same = tk.nt_xent(a[:1].expand(3, 4), a[:1].expand(3, 4), temperature=1e-3, backend="reference")
    assert same.isfinite(), "the sum needs a maximum"
    _, (grad, _) = oracle.run(tk.nt_xent, [a * torch.tensor([[0.0], [1], [1]]), b], backend="reference")
    assert grad.isfinite().all() and not grad[0].any(), "a zero row has gradient 0"


def check_general():
    """Raises AssertionError unless the general operation is what its formulas say."""
    for problem in test_general.PROBLEMS.values():
        if problem.n * problem.K < 500:
            sets = problem.sets()
            outputs, grads = test_general.run(functools.partial(problem.call, "reference"), sets, 0.3)
            wanted, wanted_grads = test_general.run(problem.formula, sets, 0.3)
            for found, want in zip((*outputs, *grads), (*wanted, *wanted_grads), strict=True):
                assert oracle.error(found, want) < 1e-11


def check_candidates():
    """Raises AssertionError unless the losses with labels and further negatives are their printed formulas."""
    own = dict(labels=test_candidates.LABELS, further="own", decoupled=False)
    alone = dict(labels=None, further="of all", decoupled=True)
    for case, leading in ((own, (2,)), (alone, ())):
        test_candidates.test_nt_xent_equals_its_printed_formula(case, True, leading, "reference")
        test_candidates.test_clip_loss_equals_its_printed_formula(case, (True, False), leading, "reference")
        test_candidates.test_info_nce_equals_its_printed_formula(case, case is own, leading, "reference")
    test_candidates.test_instance_contrastive_equals_its_printed_formula(alone, "joint", 3, "reference")
    short = [1e-6 * x.double() for x in oracle.LOSSES["moco"].inputs((3, 2, 4))]
    _, grads = oracle.run(
        tk.info_nce, [x.half() for x in short[:2]], in_batch=False, negatives=short[1].half(), backend="reference"
    )
    assert not any(g.isnan().any() for g in grads)


def test_the_unchanged_code_passes_every_check():
    check_losses()
    check_general()
    check_candidates()


@pytest.mark.parametrize(
    "bug, check",
    [*((bug, check_losses) for bug in BUGS.values()), *((bug, check_general) for bug in GENERAL_BUGS.values())],
    ids=[*BUGS, *GENERAL_BUGS],
)
def test_planted_bug_in_the_reference_backend_is_found(bug, check, monkeypatch):
    assert bug[0] in SOURCE
    monkeypatch.setattr(backends, "reference", backend_from(SOURCE.replace(*bug)))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("bug", CANDIDATE_BUGS)
def test_planted_bug_in_the_losses_is_found(bug, monkeypatch):
    old, new = CANDIDATE_BUGS[bug]
    assert old in CANDIDATES
    planted = types.ModuleType("tclr_kernels.planted")
    planted.__package__ = "tclr_kernels"
    monkeypatch.setitem(sys.modules, "tclr_kernels.planted", planted)
    exec(CANDIDATES.replace(old, new), vars(planted))
    monkeypatch.setattr(losses, "candidates", planted)
    with pytest.raises(AssertionError):
        check_candidates()
