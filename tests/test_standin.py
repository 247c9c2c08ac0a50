"""The Triton backend with Triton's own compiler and launcher, on the stand-in for a GPU driver of standin.py."""

import functools
import itertools
import os
import random
import re
from typing import NamedTuple

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import general

from .oracle import DTYPES, FURTHER, LOSSES, SEVERAL_CALLS

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the place of the just-in-time compiler", allow_module_level=True)

from tclr_kernels.triton import large, rectangle, sets, small, wide  # noqa: E402

from . import standin  # noqa: E402

CAPABILITIES = 80, 90, 100
SIZES = dict(
    G=(1, 1, 1, 3, 16, 700),
    V=(1, 2, 2, 2, 3, 8, 33),
    N=(1, 2, 5, 16, 17, 40, 64, 65, 77, 100, 127, 128, 129, 256, 300),
    D=(1, 2, 3, 16, 17, 64, 100, 128, 130, 256, 300, 512, 513, 1024, 1100, 2100),
)
TEMPERATURES = (
    *(0.1, 0.005, 10),
    *(torch.tensor(0.1, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
)
LAYOUTS = {  # memory layouts of a tensor [G, N, D]
    "contiguous": lambda G, N, D, **how: torch.empty(G, N, D, **how),
    "an entry after the start": lambda G, N, D, **how: torch.empty(G, N, D + 1, **how)[..., 1:],
    "transposed": lambda G, N, D, **how: torch.empty(G, D, N, **how).mT,
    "every other row": lambda G, N, D, **how: torch.empty(G, 2 * N, D, **how)[:, ::2],
    "every other feature": lambda G, N, D, **how: torch.empty(G, N, 2 * D, **how)[..., ::2],
    "one row for all": lambda G, N, D, **how: torch.empty(G, 1, D, **how).expand(G, N, D),
}


@pytest.fixture(params=CAPABILITIES, ids="sm_{}".format)
def device(request, monkeypatch):
    return standin.install(monkeypatch, request.param)


@pytest.fixture
def hopper(monkeypatch):
    return standin.install(monkeypatch, 90)


class Problem(NamedTuple):
    """A random forward and backward of the operation."""

    G: int
    V: int
    N: int
    D: int
    dtype: torch.dtype
    layout: str
    tau: object
    normalize: bool
    cross: bool
    tf32: bool
    upstream: tuple  # whether there are upstream gradients of term, neg and pos

    def run(self, monkeypatch):
        monkeypatch.setattr(large, "tf32_allowed", lambda: self.tf32)
        sets = [LAYOUTS[self.layout](self.G, self.N, self.D, dtype=self.dtype) for _ in range(self.V)]
        settings = sets, self.tau, self.normalize, self.cross
        _, neg, pos = tk.backends.triton.forward(*settings)
        tk.backends.triton.backward(*settings, neg, pos, *(neg if given else None for given in self.upstream))


def drawn(seed):
    choose = random.Random(seed).choice
    sizes = {name: choose(values) for name, values in SIZES.items()}
    return Problem(
        **sizes,
        dtype=choose(DTYPES),
        layout=choose([*LAYOUTS, "contiguous", "contiguous"]),
        tau=choose(TEMPERATURES),
        normalize=choose((True, True, False)),
        cross=choose((True, False)) and sizes["V"] > 1,
        tf32=choose((True, False)),
        upstream=choose(list(itertools.product((True, False), repeat=3))),
    )


class Rectangle(NamedTuple):
    """A random forward and backward of the general operation."""

    G: int
    A: int
    C: int
    n: int
    K: int
    D: int
    dtype: torch.dtype
    layout: str
    tau: object
    normalize: bool
    cross: bool
    tf32: bool
    first: int
    symmetric: bool  # the rows are the columns
    keys: bool
    pairs: bool
    anchors: tuple  # whether (rows, columns) are anchors
    wanted: tuple  # whether the gradients of (rows, columns) are computed

    def run(self, monkeypatch):
        monkeypatch.setattr(large, "tf32_allowed", lambda: self.tf32)
        triton, make = tk.backends.triton, functools.partial(LAYOUTS[self.layout], dtype=self.dtype)
        columns = [make(self.G, self.K, self.D) for _ in range(self.C)]
        rows = [] if self.symmetric else [make(self.G, self.n, self.D) for _ in range(self.A)]
        keys = [torch.zeros(1, size, dtype=torch.int64).expand(self.G, -1) for size in (self.n, self.K)]
        settings = rows, columns, self.tau, self.normalize, self.cross, self.first, *(keys if self.keys else [None] * 2)
        mean = self.A == self.C == 1 and self.first < 0 and not self.keys
        triton.rectangle(*settings, mean)
        of_rows = torch.zeros(self.G, self.A, self.C, self.n, dtype=torch.float64)
        of_columns = torch.zeros(self.G, self.C, self.A, self.K, dtype=torch.float64)
        if self.pairs:
            triton.pairs(*settings, of_rows)
        given = 2 if self.pairs else 7 if self.keys else 3
        anchors = [[x] * given if there else [] for x, there in zip((of_rows, of_columns), self.anchors, strict=True)]
        triton.rectangle_backward(*settings, *anchors, *self.wanted)


def drawn_rectangle(seed):
    choose = random.Random(seed).choice
    G, V, n, D = (choose(values) for values in SIZES.values())
    K, first, symmetric, keys = choose(SIZES["N"]), -1, False, choose((True, False))
    if choose((True, False)):
        symmetric = choose((True, False))
        first, K = (0, n) if symmetric else (min(choose(SIZES["N"]), K), K)
        n = min(n, K - first)
    A, C = (V, V) if first >= 0 else (V, choose(SIZES["V"]))
    return Rectangle(
        *(G, A, C, n, K, D),
        dtype=choose(DTYPES),
        layout=choose([*LAYOUTS, "contiguous", "contiguous"]),
        tau=choose(TEMPERATURES),
        normalize=choose((True, True, False)),
        cross=choose((True, False)) and A == C > 1,
        tf32=choose((True, False)),
        first=first,
        symmetric=symmetric,
        keys=keys,
        pairs=keys and choose((True, False)),
        anchors=(True, False) if symmetric else choose(((True, False), (True, False), (True, True), (False, True))),
        wanted=(True, False) if symmetric else choose(((True, True), (True, False), (False, True))),
    )


def problems(first_seed, draw=drawn):
    """Yields random problems without end, leaving out those that need much memory."""
    for seed in itertools.count(first_seed):
        problem = draw(seed)
        rows, sets = (problem.N, problem.V) if draw is drawn else (max(problem.n, problem.K), problem.A + problem.C)
        if problem.G * sets * rows * max(problem.D, sets) < 2e7:
            yield problem


def failures(found, monkeypatch):
    """The problems that raise an error, with their errors."""
    failed = []
    for problem in found:
        try:
            problem.run(monkeypatch)
        except Exception as error:
            failed.append(f"{problem}: {type(error).__name__}: {str(error)[-300:]}")
    return failed


def test_random_problems_compile(device, rotation, monkeypatch):
    assert failures(itertools.islice(problems(1000 * rotation), 60), monkeypatch) == []


@pytest.mark.full
def test_many_random_problems_compile(device, monkeypatch):
    assert failures(itertools.islice(problems(0), 2000), monkeypatch) == []


def test_random_rectangles_compile(device, rotation, monkeypatch):
    assert failures(itertools.islice(problems(1000 * rotation, drawn_rectangle), 8), monkeypatch) == []


@pytest.mark.full
def test_many_random_rectangles_compile(device, monkeypatch):
    assert failures(itertools.islice(problems(0, drawn_rectangle), 1000), monkeypatch) == []


LOSS_SIZES = (129, 3, 64), (1, 2, 8), (5, 4, 33), (40, 4, 128)
LOSS_CASES = [  # losses that use the same kernels run at one size, and the other sizes are marked full
    pytest.param(name, sizes, marks=pytest.mark.full if name in FURTHER and sizes != LOSS_SIZES[0] else ())
    for name, sizes in itertools.product(LOSSES, LOSS_SIZES)
]


@pytest.mark.parametrize("name, sizes", LOSS_CASES)
def test_every_loss_compiles(name, sizes, device):
    loss = LOSSES[name]
    inputs = [x.requires_grad_() for x in loss.inputs(sizes, torch.float32)]
    loss.call(*inputs, backend="triton").sum().backward()
    assert device.launched


# ---- what a call costs: launches, other operations, and what is compiled for it


def pair(N=300, D=128, dtype=torch.bfloat16, G=1):
    """Two views of N rows that require gradients."""
    shape = (N, D) if G == 1 else (G, N, D)
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(2)]


LARGE = ["rows_kernel", "sums_kernel", "finish_kernel"], ["rows_kernel", "coefficients_kernel", "gradient_kernel"]
UNBOUNDED = ["rows_kernel", "unbounded_sums_kernel", "finish_kernel"], LARGE[1]
BOTH_RANGES = (
    ["rows_kernel", "sums_kernel", "unbounded_sums_kernel", "finish_kernel"],
    ["rows_kernel", "coefficients_kernel", "gradient_kernel", "gradient_kernel"],
)
SPLIT = LARGE[0], [*LARGE[1], "join_kernel"]
CALLS = {  # name -> (inputs, temperature, launches of the forward and of the backward)
    "few rows a group": (pair(4, G=40), 0.1, (["forward_kernel"], ["backward_kernel"])),
    "a set is one super-block": (pair(40), 0.1, LARGE),
    "several super-blocks": (pair(20000), 0.1, LARGE),
    "columns split": (pair(2048), 0.1, SPLIT),
    "a temperature below the bound": (pair(20000), 0.005, UNBOUNDED),
    "a temperature on the device": (pair(20000), torch.tensor(0.1), BOTH_RANGES),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_makes_the_expected_launches_and_operations(name, hopper):
    inputs, tau, launches = CALLS[name]
    for _ in range(2):
        with hopper.counted() as forward:
            loss = tk.nt_xent(*inputs, temperature=tau, backend="triton")
        with hopper.counted() as backward:
            torch.autograd.grad(loss, inputs)
    assert (forward[0], backward[0]) == launches
    assert (forward[1], backward[1]) == (["sum"], ["ones_like"])


@pytest.mark.parametrize("form, most", [("paper", 20), ("release", 28)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [8, 40, 256])
def test_the_objective_makes_few_launches_and_operations(B, dtype, form, most, hopper):
    shapes = (2, B, 128), (2, B, 4, 128), (2, B, 4, 128)
    inputs = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    with hopper.counted() as (launches, operations):
        torch.autograd.grad(tk.tclr(*inputs, form=form, backend="triton").total, inputs)
    most += 2 * (dtype.itemsize == 2)  # a cast of all inputs to float32, and one of all gradients back
    assert len(launches) + len(operations) <= most, (launches, operations)


def test_a_kept_kernel_is_the_one_that_triton_would_choose(hopper, monkeypatch):
    """Random problems of many sizes, dtypes, layouts and temperatures run twice each, at different addresses."""
    ran, kept = [], sets.launch
    monkeypatch.setattr(standin._NotCompiled, "run", lambda kernel, *arguments: ran.append(kernel))

    def both(kernel, programs, *arguments, **settings):
        kept(kernel, programs, *arguments, **settings)
        kernel[(programs,)](*arguments, **settings, **sets.COMPILER_OPTIONS)

    for module in (large, small, wide):
        monkeypatch.setattr(module, "launch", both)
    for problem in itertools.islice(problems(0), 40):
        for _ in range(2):
            problem.run(monkeypatch)
    assert len(ran) > 400 and all(x is y for x, y in zip(ran[::2], ran[1::2], strict=True))
    assert len(sets._held) < len(ran) / 3


@pytest.mark.parametrize("x, y", [(1, 2), (15, 16), (2**31 - 1, 2**31), (2**63 - 16, 2**63), (-16, 0), (-15, -16)])
def test_integers_that_triton_specialises_differently_are_told_apart(x, y):
    assert sets.specialised([x]) != sets.specialised([y])


def test_launch_hooks_see_kept_kernels_too(monkeypatch):
    device = standin.install(monkeypatch, whole=True)
    inputs, seen = pair(4, G=40), []

    def step():
        torch.autograd.grad(tk.nt_xent(*inputs, backend="triton"), inputs)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    step()
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(hook)
    try:
        step()
    finally:
        hooks.remove(hook)
    step()
    assert seen == ["forward_kernel", "backward_kernel"] and device.launched == seen * 3


def test_a_kernel_is_kept_for_one_mode_of_the_compiler(hopper, monkeypatch):
    """If a debugger or profiler changes the mode between two calls, Triton must compile again."""
    sets_of_rows = [z.detach()[None] for z in pair(4)]
    for debug in (False, True, False):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        tk.backends.triton.forward(sets_of_rows, 0.1, True, False)
    assert hopper.variants["forward_kernel"] == 2


@pytest.mark.parametrize("tau, sums", [(0.1, ["sums"]), (torch.tensor(0.1), ["sums", "unbounded_sums"])])
def test_many_features_use_matrix_products_of_the_library(tau, sums, hopper):
    """S is computed once, in chunks of rows. If it may be unbounded, there is another launch, which does nothing."""
    inputs = pair(4096, 1024)
    with hopper.counted() as forward:
        loss = tk.nt_xent(*inputs, temperature=tau, backend="triton")
    with hopper.counted() as backward:
        torch.autograd.grad(loss, inputs)
    chunks = 8192 * 8192 // wide.ENTRIES
    more = ["gradient"] if len(sums) > 1 else []
    backwards = ["rows", "coefficients", *["weights"] * chunks, "wide_join", *more]
    assert forward == ([f"{name}_kernel" for name in ("rows", *sums, "finish")], ["sum"])
    assert backward == ([f"{name}_kernel" for name in backwards], ["ones_like"])


@pytest.mark.parametrize(
    "G, V, NP, cross", [(1, 2, 4096, False), (1, 3, 65536, True), (700, 4, 64, True), (5, 1, 640, False)]
)
def test_chunks_make_every_product_once_and_hold_little(G, V, NP, cross):
    made = torch.zeros(G, V * NP // 64, V * NP // 64, dtype=torch.int32)
    for groups, rows, columns in wide.chunks(G, V, NP, cross, 64):
        made[groups, rows.start // 64 : rows.stop // 64, columns.start // 64 : columns.stop // 64] += 1
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert (groups.stop - groups.start) * height * width <= max(wide.ENTRIES, 256 * width)
    sets = torch.arange(V * NP // 64) * 64 // NP
    wanted = (sets[:, None] < (V + 1) // 2) != (sets < (V + 1) // 2) if cross else torch.tensor(True)
    assert torch.equal(made, wanted.int().expand_as(made))


def named(*kernels):
    return [name if name.startswith("rows") else f"rectangle_{name}" for name in (f"{k}_kernel" for k in kernels)]


LABELS = torch.zeros(256, dtype=torch.int64)
GRADIENT = named("gradient", "join")
BOTH_PACKED = named("rows", "rows")
FORWARD, WEIGHTS = named("sums", "finish"), named("units", "coefficients")
LABELLED = dict(row_keys=LABELS[:100], column_keys=LABELS)
# name -> (a call, additional launches of its forward, launches of its backward after those for the packed rows)
RECTANGLES = {
    "both sides": (lambda r, z: tk.rectangle(r, z, backend="triton"), [], GRADIENT * 2),
    "labels": (lambda r, z: tk.rectangle(r, z, **LABELLED, backend="triton").spread, [], GRADIENT * 2),
    "a temperature on the device": (
        lambda r, z: tk.rectangle(r, z, torch.tensor(0.1), backend="triton"),
        [],
        GRADIENT * 2,
    ),
    "columns without gradient": (
        lambda r, z: tk.rectangle(r, z.detach(), backend="triton"),
        ["rectangle_mean_kernel"],
        None,
    ),
}


@pytest.mark.parametrize("name", RECTANGLES)
def test_a_rectangle_makes_the_expected_launches(name, hopper):
    call, more, gradient = RECTANGLES[name]
    rows, columns = (torch.zeros(size, 64, requires_grad=True) for size in (100, 256))
    with hopper.counted() as forward:
        out = call(rows, columns)
    with hopper.counted() as backward:
        torch.autograd.grad(out.sum(), (rows, columns), allow_unused=True)
    assert forward[0] == BOTH_PACKED + FORWARD + more
    assert backward[0] == ([] if gradient is None else BOTH_PACKED + WEIGHTS + gradient)


@pytest.mark.parametrize("keys", [None, LABELS[None]])
def test_rows_against_themselves_make_the_expected_launches(keys, hopper):
    rows = torch.zeros(1, 256, 64, requires_grad=True)
    settings = general.Settings("triton", True, False, 0)
    with hopper.counted() as forward:
        neg, pos = general.rectangle(settings, 0.1, (keys, keys), [], [rows])[:2]
    with hopper.counted() as backward:
        torch.autograd.grad((neg + pos).sum(), rows)
    assert forward == (named("rows", "sums", "finish"), [])
    assert backward[0] == named("rows", "units", "coefficients", "gradient", "join")


# name -> (a call of two sets and a queue, the most operations beside launches that its forward and backward may take)
QUEUED = {
    "info_nce": (tk.info_nce, 9, 26),
    "info_nce, labels": (functools.partial(tk.info_nce, labels=LABELS), 9, 28),
    "info_nce, out of batch": (functools.partial(tk.info_nce, in_batch=False), 5, 24),
    "nt_xent": (tk.nt_xent, 20, 36),
    "clip": (lambda a, b, negatives, **how: tk.clip_loss(a, b, negatives=(negatives,) * 2, **how), 13, 40),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUEUED)
def test_losses_with_a_queue_make_few_operations(name, dtype, hopper):
    """In eager mode, each of them takes longer on the host than on the device."""
    call, forward_most, backward_most = QUEUED[name]
    rows, queue = pair(256, 128, dtype), torch.zeros(1024, 128, dtype=dtype)
    with hopper.counted() as (_, forward):
        loss = call(*rows, negatives=queue, backend="triton")
    with hopper.counted() as (_, backward):
        torch.autograd.grad(loss, rows)
    converts = dtype.itemsize == 2  # the rows and the queue; and the gradients
    assert len(forward) <= forward_most + 2 * converts, forward
    assert len(backward) <= backward_most + converts, backward


# losses that convert their inputs of half precision to float32, so that gradients are added in float32
CONVERTING = {name: LOSSES[name].call for name in SEVERAL_CALLS} | {
    "clip_loss with queues": lambda a, b, q, r, **how: tk.clip_loss(a, b, negatives=(q, r), **how),
    "gram of a range": lambda *z, **how: tk.gram([x[None, :9] for x in z], rows=(2, 5), **how).term,
}


@pytest.mark.parametrize(
    "D, dtype, carried",
    [
        (64, torch.bfloat16, torch.float16),
        (64, torch.float16, torch.float16),
        (32, torch.bfloat16, torch.float32),
        (64, torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CONVERTING)
def test_converted_rows_of_half_precision_have_products_of_half_precision(name, D, dtype, carried, hopper, monkeypatch):
    """Decoupled losses are an exception, since the rounding error of the positive counts in full there."""
    found, packed = [], rectangle.packed
    monkeypatch.setattr(rectangle, "packed", lambda *arguments: found.append(packed(*arguments)) or found[-1])
    inputs = [x.requires_grad_() for x in LOSSES.get(name, LOSSES["clip_loss decoupled"]).inputs((9, 2, D), dtype)]
    loss = CONVERTING[name](*inputs, temperature=0.1, backend="triton")
    torch.autograd.grad(loss.sum(), inputs)
    carried = torch.float32 if name == "clip_loss decoupled" else carried
    assert len(found) > 2 and {x.z.dtype for x in found} == {carried}


@pytest.mark.parametrize("D, carried", [(32, torch.float32), (64, torch.float16)])
def test_rows_of_half_precision_stay_so_in_the_objective(D, carried, hopper, monkeypatch):
    found, packed = [], large.packed
    monkeypatch.setattr(large, "packed", lambda *arguments: found.append(packed(*arguments)) or found[-1])
    inputs = [torch.ones(2, 256, *T, D, dtype=torch.bfloat16, requires_grad=True) for T in ((), (4,), (4,))]
    torch.autograd.grad(tk.tclr(*inputs, form="release", backend="triton").total, inputs)
    assert len(found) == 4 and {x.z.dtype for x in found} == {carried}  # of ic_global and ic_local


@pytest.mark.parametrize("keys, of_columns", [(False, False), (True, True)])
def test_sizes_of_rectangles_compile_few_variants(keys, of_columns, hopper):
    """Such sizes come from shares, queues and batches that vary."""
    choose = random.Random(0)
    for _ in range(100):
        n, K = (int(2 ** choose.uniform(0, 12)) for _ in range(2))
        first = choose.randrange(K) if of_columns else -1
        n = min(n, K - first) if of_columns else n
        rows, columns = ([torch.empty(1, size, 128, dtype=torch.bfloat16)] for size in (n, K))
        labels = [torch.empty(1, size, dtype=torch.int64) if keys else None for size in (n, K)]
        wide = torch.empty(1, 1, 1, n, dtype=torch.float64)
        settings = rows, columns, 0.1, True, False, first, *labels
        tk.backends.triton.rectangle(*settings, False)
        tk.backends.triton.rectangle_backward(*settings, [wide] * (7 if keys else 3), [], True, True)
    assert max(hopper.variants.values()) <= 12, hopper.variants


@pytest.mark.parametrize("D, dtype", [(128, torch.bfloat16), (100, torch.float32), (513, torch.float16)], ids=str)
def test_sizes_compile_few_variants(D, dtype, hopper):
    """A training run whose batches vary in size must not compile a kernel for each."""
    choose = random.Random(0)
    for _ in range(500):
        a, b = torch.empty(2, 1, int(2 ** choose.uniform(0, 12)), D, dtype=dtype)
        for tau in (0.1, 0.005):
            _, neg, pos = tk.backends.triton.forward([a, b], tau, True, False)
            tk.backends.triton.backward([a, b], tau, True, False, neg, pos, neg, None, None)
    assert len(hopper.variants) == (11 if D > 512 else 9) and max(hopper.variants.values()) <= 12, hopper.variants


def test_other_addresses_of_the_sets_compile_nothing_new(hopper):
    """The allocator may put the second set after the first or before it, near or far away."""
    memory = torch.zeros(64, 300, 64, dtype=torch.bfloat16)
    for first, second in ((0, 1), (1, 0), (0, 63), (63, 0)):
        tk.backends.triton.forward([memory[first][None], memory[second][None]], 0.1, True, False)
    assert set(hopper.variants.values()) == {1}


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CALLS)
def test_calls_compile_down_to_a_cubin(name, capability, monkeypatch):
    device = standin.install(monkeypatch, capability, whole=True)
    inputs, tau, launches = CALLS[name]
    torch.autograd.grad(tk.nt_xent(*inputs, temperature=tau, backend="triton"), inputs)
    assert device.launched == launches[0] + launches[1]
    assert all(kernel.asm["cubin"] for kernel in device.compiler.kernels)


def test_lanes_that_share_a_row_round_their_products_before_they_add_them(monkeypatch):
    """Each lane adds another lane's product to its own one. If that is one fma, the lanes get different last bits."""
    device = standin.install(monkeypatch, whole=True)
    for N, D in (4, 136), (77, 136), (77, 16):
        x = torch.randn(N, D)
        tk.nt_xent(x, x, backend="triton")
        tk.sup_con(x, torch.arange(N) % 5, backend="triton")
    moved = 0
    for kernel in device.compiler.kernels:
        of_others = set()  # registers with a number of another lane
        for line in kernel.asm["ptx"].splitlines():
            to, *read = re.findall(r"%\w+", line) or [""]
            if "shfl.sync" in line or re.search(r"\b(mov|cvt|shl|or)\.", line) and of_others.intersection(read):
                of_others.add(to)
            else:
                assert "fma.rn" not in line or read[-1] not in of_others, (kernel.name, line)
                of_others.discard(to)
            moved += "shfl.sync" in line
    assert moved
