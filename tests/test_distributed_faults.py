"""A mistake on one of several processes is an error on all of them, within a second, and the next correct call works.

Also, the tests must find bugs that are planted in the distributed code.
"""

import inspect
import os
import random
import re
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tclr_kernels as tk
from tclr_kernels import distributed

from . import test_distributed
from .ranks import Error, Pool

SECONDS = 1  # within which every rank must raise an error


def rows(n=3, D=6, **more):
    return torch.randn(n, D, **more)


class Wrong(torch.Tensor):
    """A tensor that raises an error in every operation."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), settings=None):
        raise RuntimeError("an error of one's own")


def nt_xent(a, b, **settings):
    return tk.nt_xent(a, b, backend="reference", **settings)


def gradient(a, b, **settings):
    return nt_xent(a.requires_grad_(), b, **settings)


CALLS = {  # fault -> (the correct call, the faulty call, the error on all ranks)
    "D": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: nt_xent(rows(D=5), rows(D=5), **s),
        "ranks differ in D",
    ),
    "dtype": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: nt_xent(rows().double(), rows().double(), **s),
        "ranks differ in dtype: found .*torch.float64",
    ),
    "V": (
        lambda **s: tk.instance_contrastive(torch.randn(3, 3, 6), backend="reference", **s),
        lambda **s: tk.instance_contrastive(torch.randn(2, 3, 6), backend="reference", **s),
        "ranks differ in the number of sets or views: found ",
    ),
    "leading dimensions": (
        lambda **s: nt_xent(torch.randn(2, 3, 6), torch.randn(2, 3, 6), **s),
        lambda **s: nt_xent(torch.randn(4, 3, 6), torch.randn(4, 3, 6), **s),
        "ranks differ in the leading dimensions",
    ),
    "a setting": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: nt_xent(rows(), rows(), normalize=False, **s),
        "ranks differ in the loss or its settings",
    ),
    "the temperature": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: nt_xent(rows(), rows(), temperature=0.2, **s),
        "ranks differ in the loss or its settings",
    ),
    "weights": (
        lambda **s: tk.tclr(*clips(), backend="reference", weights=dict(ll=1, gl=2), **s),
        lambda **s: tk.tclr(*clips(), backend="reference", weights=dict(gl=1, ll=2), **s),
        "ranks differ in the loss or its settings",
    ),
    "form": (
        lambda **s: tk.tclr(*clips(), backend="reference", **s),
        lambda **s: tk.tclr(*clips(), backend="reference", form="release", **s),
        "ranks differ in the loss or its settings",
    ),
    "another loss": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: tk.clip_loss(rows(), rows(), backend="reference", **s),
        "ranks differ in the loss or its settings",
    ),
    "labels on one rank": (
        lambda **s: nt_xent(rows(), rows(), **s),
        lambda **s: nt_xent(rows(), rows(), labels=torch.zeros(3, dtype=torch.int64), **s),
        "ranks differ in the loss or its settings",
    ),
    "negatives of each group": (
        lambda **s: nt_xent(torch.randn(2, 3, 6), torch.randn(2, 3, 6), negatives=rows(4), **s),
        lambda **s: nt_xent(torch.randn(2, 3, 6), torch.randn(2, 3, 6), negatives=torch.randn(2, 4, 6), **s),
        "ranks differ in the loss or its settings",
    ),
    "a queue on one rank": (
        lambda **s: nt_xent(rows(), rows(), negatives=rows(5), **s),
        lambda **s: nt_xent(rows(), rows(), negatives=tk.NegativeQueue(5, 6), **s),
        "ranks differ in the loss or its settings",
    ),
    "another queue": (
        lambda **s: nt_xent(rows(), rows(), negatives=tk.NegativeQueue(5, 6), **s),
        lambda **s: nt_xent(rows(), rows(), negatives=tk.NegativeQueue(4, 6), **s),
        "ranks differ in the loss or its settings",
    ),
    "gradient of an input": (
        lambda **s: gradient(rows(), rows(), **s),
        lambda **s: nt_xent(rows(), rows(), **s),
        "ranks differ in which inputs require a gradient",
    ),
    "gradient of the temperature": (
        lambda **s: nt_xent(rows(), rows(), temperature=torch.tensor(0.1, requires_grad=True), **s),
        lambda **s: nt_xent(rows(), rows(), temperature=torch.tensor(0.1), **s),
        "ranks differ in which inputs require a gradient",
    ),
    "no_grad": (
        lambda **s: gradient(rows(), rows(), **s),
        lambda **s: torch.no_grad()(gradient)(rows(), rows(), **s),
        "ranks differ in which inputs require a gradient",
    ),
    "no rows at all": (
        lambda **s: nt_xent(rows(0), rows(0), **s),
        lambda **s: nt_xent(rows(0), rows(0), **s),
        "group: found no rows on any rank, wanted one at least",
    ),
    "no negatives at all": (
        lambda **s: nt_xent(rows(), rows(), negatives=rows(0), **s),
        lambda **s: nt_xent(rows(), rows(), negatives=rows(0), **s),
        "negatives: found none on any rank",
    ),
}
OWN = {  # fault of one rank -> (its call, its error); the other ranks' error names the rank
    "an argument": (lambda **s: nt_xent(rows(), rows(), reduction="median", **s), "reduction: found 'median'"),
    "an unknown argument": (lambda **s: nt_xent(rows(), rows(), median=True, **s), "unexpected keyword argument"),
    "a missing argument": (lambda **s: tk.nt_xent(rows(), **s), "missing 1 required positional argument"),
    "shapes": (lambda **s: nt_xent(rows(2), rows(), **s), "wanted the same shape"),
    "a type": (lambda **s: nt_xent([[1.0]], rows(), **s), "a: found a list"),
    "temperature": (lambda **s: nt_xent(rows(), rows(), temperature=-1, **s), "temperature: found -1"),
    "a huge temperature": (lambda **s: nt_xent(rows(), rows(), temperature=10**400, **s), "temperature: found 1000"),
    "an integer": (lambda **s: nt_xent(rows().long(), rows().long(), **s), "a: found dtype torch.int64"),
    "labels": (lambda **s: nt_xent(rows(), rows(), labels=torch.zeros(4, dtype=torch.int64), **s), "labels: found"),
    "labels of videos": (lambda **s: tk.tclr(*clips(), labels=torch.zeros(1), **s), "labels: found dtype"),
    "negatives": (lambda **s: nt_xent(rows(), rows(), negatives=rows(4, 5), **s), "negatives: found shape"),
    "decoupled": (lambda **s: nt_xent(rows(), rows(), decoupled=1, **s), "decoupled: found 1"),
    "weights": (lambda **s: tk.tclr(*clips(), weights=dict(lx=1), **s), "weights: found the key 'lx'"),
    "backend": (lambda **s: tk.nt_xent(rows(), rows(), backend="cudnn", **s), "backend: found 'cudnn'"),
    "backend of videos": (
        lambda **s: tk.local_local(rows()[None], rows()[None], backend="cudnn", **s),
        "backend: found 'cudnn'",
    ),
    "backend of moco": (
        lambda **s: tk.info_nce(rows(), rows(), in_batch=False, negatives=rows(), backend="cudnn", **s),
        "backend: found 'cudnn'",
    ),
    "its own": (lambda **s: nt_xent(rows().as_subclass(Wrong), rows(), **s), "an error of one's own"),
    "a device": (lambda **s: nt_xent(rows(device="meta"), rows(device="meta"), **s), "group: found embeddings on meta"),
    "keys of a queue": (lambda **s: tk.NegativeQueue(4, 6).enqueue(rows(2, 5), **s), "keys: found shape"),
    "a DTensor": (lambda **s: nt_xent(distributed_rows(), distributed_rows(), **s), "a: found a DTensor"),
}


def clips():
    return torch.randn(2, 3, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)


def distributed_rows():
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(rows(), dist.DeviceMesh("cpu", [dist.get_rank()]), [Replicate()])


def attempt(group, call, limit=None, **settings):
    """The error of a call, and the seconds it took from when all ranks were ready."""
    dist.barrier(group)
    start = time.perf_counter()
    try:
        call(group=group, **settings)
        found = "no error"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.perf_counter() - start


def sound(group):
    """The value of a correct call."""
    torch.manual_seed(0)
    a, b = (x[2 * dist.get_rank(group) :][:2] for x in torch.randn(2, 8, 6))
    return tk.nt_xent(a, b, group=group, backend="reference").item()


def with_fault(group, kind, where, checked, shares):
    os.environ["TCLR_KERNELS_CHECK"] = "1" if checked else "0"
    try:
        faulty = dist.get_rank(group) == where
        if kind in CALLS:
            call = CALLS[kind][faulty]
        else:
            call = OWN[kind][0] if faulty else lambda **s: nt_xent(rows(), rows(), **s)
        return *attempt(group, call, **shares), sound(group)
    finally:
        os.environ.pop("TCLR_KERNELS_CHECK")


def expected():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 6)
    return {P: tk.nt_xent(a[: 2 * P], b[: 2 * P], backend="reference").item() for P in (2, 3, 4)}


def judge(kind, where, found):
    assert not any(isinstance(x, Error) for x in found), found
    values = expected()
    for rank, (message, seconds, value) in enumerate(found):
        assert seconds < SECONDS, found
        assert value == pytest.approx(values[len(found)], rel=1e-5)
        if kind in CALLS:
            error = "ValueError: "
            wanted = CALLS[kind][2]
        elif rank == where:
            error, wanted = "", OWN[kind][1]
        else:
            error, wanted = "RuntimeError: ", f"group: rank {where} of {len(found)} raised an error in this call"
        assert message.startswith(error) and re.search(wanted, message), (rank, message)


def known(kind, P):
    n = 0 if kind == "no rows at all" else 3
    return dict(shares=[n] * P)


@pytest.mark.parametrize("kind", [*CALLS, *(f"own: {kind}" for kind in OWN)])
def test_an_error_of_one_rank_is_raised_on_all(kind, pool):
    kind = kind.removeprefix("own: ") if kind.startswith("own: ") else kind
    for P, where in ((3, 1), (2, 0)):
        judge(kind, where, pool.run(P, with_fault, kind, where, False, {}))
    if kind not in ("shapes", "a missing argument", "backend of videos", "keys of a queue", "a device"):
        judge(kind, 1, pool.run(2, with_fault, kind, 1, True, known(kind, 2)))


def shares_fault(group, given, checked):
    os.environ["TCLR_KERNELS_CHECK"] = "1" if checked else "0"
    try:
        call = lambda **s: nt_xent(rows(), rows(), **s)  # noqa: E731
        return *attempt(group, call, shares=given[dist.get_rank(group)]), sound(group) if checked else None
    finally:
        os.environ.pop("TCLR_KERNELS_CHECK")


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (
            [3, 4, 3],
            ValueError,
            "shares: found .3, 4, 3., wanted the rows of each of the 3 ranks, of which rank 1 has 3",
        ),
        ([3, 3], ValueError, "shares: found .3, 3., wanted the rows of each of the 3 ranks"),
        ([3, 3, -1], TypeError, "shares: found .3, 3, -1., wanted a list of integers >= 0"),
        (3, TypeError, "shares: found 3, wanted a list of integers"),
    ],
)
def test_wrong_shares_are_an_error(wrong, error, message, pool):
    """With checks, all ranks raise an error. Without, only ranks that notice the mistake do: here, all."""
    found = pool.run(3, shares_fault, [[3, 3, 3], wrong, [3, 3, 3]], True)
    for rank, (text, seconds, _) in enumerate(found):
        pattern = message if rank == 1 else "group: rank 1 of 3 raised"
        assert re.search(pattern, text) and seconds < SECONDS, found
    assert found[1][0].startswith(error.__name__)
    if not isinstance(wrong, int) and len(wrong) == 3 and wrong[1] == 3:
        found = pool.run(3, shares_fault, [wrong] * 3, False)
        assert all(text.startswith(error.__name__) for text, *_ in found)


def test_tclr_kernels_check_refuses_shares_that_differ_between_ranks(pool):
    for given in ([[3, 3], [2, 3]], [[3, 4], [3, 3]], [None, [3, 3]]):
        for text, seconds, _ in pool.run(2, shares_fault, given, True):
            assert (
                "group: ranks differ in shares, the rows of each rank" in text or "raised an error in this call" in text
            )
            assert seconds < SECONDS


def negatives_of_many_sizes(group, checked):
    os.environ["TCLR_KERNELS_CHECK"] = "1"
    try:
        call = lambda **s: nt_xent(rows(), rows(), negatives=rows(4 + dist.get_rank(group)), **s)  # noqa: E731
        return *attempt(group, call, **(dict(shares=[3, 3]) if checked else {})), sound(group)
    finally:
        os.environ.pop("TCLR_KERNELS_CHECK")


def test_the_number_of_negatives_may_differ_only_without_shares(pool):
    assert [x[0] for x in pool.run(2, negatives_of_many_sizes, False)] == ["no error"] * 2
    for text, seconds, value in pool.run(2, negatives_of_many_sizes, True):
        assert "negatives: found K = [4, 5] on the ranks, wanted one value beside shares" in text
        assert seconds < SECONDS and value == pytest.approx(expected()[2], rel=1e-5)


def alike(group):
    """Values of calls whose settings are equal on the ranks, but of different types."""
    first = dist.get_rank(group) == 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = clips()
    weights = dict(ll=1, gl=2.0) if first else dict(gl=2, ll=np.float64(1))
    settings = {} if first else dict(temperature=0.1)
    views = list(z[0]) if first else tuple(z[0])
    values = [
        tk.tclr(*z, weights=weights, backend="reference", group=group, **settings).total,
        tk.instance_contrastive(views, group=group, backend="reference"),
    ]
    return [x.item() for x in values]


def test_equal_settings_of_different_types_are_no_error(pool):
    found = pool.run(2, alike)
    assert not any(isinstance(x, Error) for x in found) and found[0] == found[1]


# ---- many faults, and a dead rank


def of_many(seed):
    chosen = random.Random(seed)
    P = chosen.choice([2, 3, 4])
    kind = chosen.choice([*CALLS, *OWN])
    return P, kind, chosen.randrange(P)


@pytest.mark.parametrize("runs", [20, pytest.param(200, marks=pytest.mark.full)])
def test_random_faults_never_hang(runs, pool):
    for seed in range(runs):
        P, kind, where = of_many(seed)
        judge(kind, where, pool.run(P, with_fault, kind, where, False, {}, limit=20))


def dies(group, how):
    if dist.get_rank(group) == 1:
        os._exit(1)
    time.sleep(0.5)
    shares = [3, 3, 3] if how == "shares" else None
    return attempt_alone(lambda: nt_xent(rows(), rows(), group=group, shares=shares))


def attempt_alone(call):
    start = time.perf_counter()
    try:
        call()
        return "no error", 0.0
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start


@pytest.mark.parametrize("how", ["header", pytest.param("shares", marks=pytest.mark.full)])
def test_the_other_ranks_raise_an_error_if_one_dies(how):
    with Pool(3) as pool:
        found = pool.run(3, dies, how, dead=[1])
    assert found[1] is None
    for text, seconds in (found[0], found[2]):
        assert text != "no error" and seconds < 5


# ---- planted bugs

SOURCE = inspect.getsource(distributed)
BUGS = {
    "no factor P": ("return None, ctx.process.sum(g), None", "return None, g, None"),
    "the first row's place ignored": ("*settings[1:3], process.first,", "*settings[1:3], 0,"),
    "the gradient without the columns' side": (
        "of_rows, anchors, True, False,",
        "of_rows, [], True, False,",
    ),
    "padding counted as columns": ("part[:n] for part, n in", "part for part, n in"),
    "the temperature's gradient summed": ("ctx.process.sum(g) / ctx.process.size", "ctx.process.sum(g)"),
    "ranks in another order": ("parts = together.split(largest)", "parts = together.split(largest)[::-1]"),
    "this rank's rows alone in the mean": ("return sum(self.shares)", "return self.own"),
    "labels of this rank alone": (
        "all_keys = None if keys is None else process.gather(keys, -1, process.shares)",
        "all_keys = None if keys is None else process.gather(0 * keys - 1, -1, process.shares)",
    ),
    "negatives' gradient of its own anchors": (
        "everybody), mine, of_all, False)",
        "everybody), mine, of_all[:1] + tuple(x * 0.5 for x in of_all[1:]), False)",
    ),
    "own terms only in the backward": (
        "return None, ctx.process.gather(g, -1, ctx.process.shares)",
        "return None, ctx.process.gather(g * 0.5, -1, ctx.process.shares)",
    ),
    "sums of the videos of one rank": ("together = process.sum(sums)", "together = sums"),
}
NAMES = "nt_xent", "nt_xent labels decoupled", "nt_xent negatives", "local_local"


def planted(group, old, new):
    """Results of this rank with a planted bug in the distributed code."""
    names = distributed.__dict__
    exec(compile(SOURCE.replace(old, new), distributed.__file__, "exec"), names)
    try:
        shares = [5, 1, 3]
        for name in NAMES:
            test_distributed.on_ranks(group, name, shares, {}, False)
        return [test_distributed.on_ranks(group, name, shares, {}, False) for name in NAMES] + [
            test_distributed.on_ranks(group, "nt_xent", shares, dict(reduction="none"), False, (18,))
        ]
    finally:
        exec(compile(SOURCE, distributed.__file__, "exec"), names)


def agrees(found):
    """Whether values and gradients are those of one process."""
    for k, name in enumerate([*NAMES, "nt_xent"]):
        settings = dict(reduction="none") if k == len(NAMES) else {}
        inputs, out = test_distributed.by_one_process(name, 9, **settings)
        upstream = test_distributed.weights_like(out) if settings else 6.0
        wanted = torch.autograd.grad((out * upstream).sum(), inputs)
        ranks = test_distributed.tensors([x[k] for x in found])
        try:
            for rank, (value, _) in enumerate(ranks):
                whole = out.detach()
                whole = test_distributed.own_of(whole, 9, [5, 1, 3], rank) if settings else whole
                torch.testing.assert_close(value, whole, rtol=1e-10, atol=1e-10)
            test_distributed.compare(name, [5, 1, 3], ranks, wanted)
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("name", ["none", *BUGS])
def test_a_planted_bug_in_the_distributed_code_is_found(name, pool):
    old, new = BUGS.get(name, ("", ""))
    assert old in SOURCE
    found = pool.run(3, planted, old, new)
    failed = any(isinstance(x, Error) for x in found)
    assert (name == "none") == (not failed and agrees(found))
