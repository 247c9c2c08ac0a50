"""The Triton kernels in Triton's interpreter. They are tested if TRITON_INTERPRET=1 is set before pytest starts."""

import functools
import importlib
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tclr_kernels as tk
from tclr_kernels.backends import reference

from . import fuzz, oracle, test_general
from .conftest import BACKENDS
from .oracle import LOSSES, judge, run
from .test_general import PROBLEMS, Problem

if BACKENDS["triton"] is not None:
    pytest.skip(f"triton: {BACKENDS['triton']}", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kernels():
    """The package tclr_kernels.triton with its modules."""
    for name in ("large", "small", "wide", "rectangle", "sets", "tiles", "tuning", "epilogue"):
        importlib.import_module(f"tclr_kernels.triton.{name}")
    return tk.triton


@pytest.fixture
def only_large(kernels, monkeypatch):
    """The package, made to use the large path for small groups too."""
    monkeypatch.setattr(kernels.small, "LARGEST", 0)
    return kernels


def tiny(kernels, monkeypatch, BM=32, BN=16, BK=16, DC=16, kinds=("half", "float", "double")):
    """Makes tiles so small that few rows make many blocks."""
    entry = [(1 << 30, BM, BN, BK, DC, 4, 1)]
    table = {kind: dict(sums=entry, gradient=entry) for kind in kinds}
    monkeypatch.setitem(kernels.tiles.TABLES, "interpreter", table)


def deviation(module, sets, tau, normalize=True, cross=False, seed=0):
    """The largest error of values and gradients, relative to the largest entry of each."""
    generator = torch.Generator().manual_seed(seed)
    exact = [z.double().requires_grad_() for z in sets]
    wanted = reference.gram(exact, tau, normalize, cross)
    found = module.forward(sets, tau, normalize, cross)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).where(x.isfinite(), 0) for x in wanted]
    sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(wanted, upstream, strict=True)).backward()
    dx, zdz = module.backward(sets, tau, normalize, cross, *found[1:], *(g.to(found[1]) for g in upstream))
    pairs = [*zip(found, (w.detach() for w in wanted), strict=True), *zip(dx, (z.grad for z in exact), strict=True)]
    along = [(z * z.grad).sum(-1) for z in exact]
    pairs += [] if normalize else [(zdz, torch.stack(along, 1).detach())]
    return max(oracle.error(f, w) / max(1, w[w.isfinite()].abs().max().item()) for f, w in pairs if w.numel())


def some_sets(G, V, N, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]


# ---- the small and the large path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "instance_contrastive", "local_local", "global_local"])
def test_small_problems_are_accurate_on_the_large_path(name, dtype, only_large):
    judge(LOSSES[name], LOSSES[name].inputs((5, 3, 33), dtype), 0.1, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "local_local", "global_local"])
def test_small_groups_use_unrounded_unit_rows_of_half_precision(name, dtype, kernels, monkeypatch):
    monkeypatch.setattr(oracle, "FLOAT16_UNIT_ROWS", ())
    judge(LOSSES[name], LOSSES[name].inputs((4, 4, 21), dtype), 0.1, "triton")


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("M", [32, 34])
def test_problems_on_both_sides_of_the_boundary_of_the_paths_are_accurate(M, cross, kernels):
    assert kernels.small.serves(2, M // 2) == (M <= 32)
    assert deviation(tk.backends.triton, some_sets(3, 2, M // 2, 7), 0.2, cross=cross) < 1e-5


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("enough", [1, 6, 30, 10**6])
def test_super_blocks_of_every_size_are_accurate(enough, tau, cross, kernels, monkeypatch):
    tiny(kernels, monkeypatch)
    of_size = kernels.large.super_blocks
    monkeypatch.setattr(kernels.large, "super_blocks", lambda V, blocks, G, _: of_size(V, blocks, G, enough))
    assert deviation(tk.backends.triton, some_sets(1, 3, 71, 5), tau, cross=cross) < 1e-4 * max(1, 0.01 / tau)


@pytest.mark.parametrize("D", [12, 40])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tau", [0.2, torch.tensor(0.2), torch.tensor(0.005)])
def test_gradients_from_splits_of_the_columns_are_accurate(tau, cross, D, kernels, monkeypatch):
    tiny(kernels, monkeypatch)
    monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", 40))
    sets = some_sets(1, 2, 50, D)
    assert deviation(tk.backends.triton, sets, tau, cross=cross) < 1e-5 * max(1, 0.05 / float(tau))


@pytest.mark.parametrize("D, DP", [(100, 128), (150, 192), (384, 384), (400, 448), (520, 576)])
def test_features_are_padded_to_a_multiple_of_64_without_changing_results(D, DP, kernels, monkeypatch):
    tiny(kernels, monkeypatch, BM=64, BN=64, BK=64, DC=64)
    assert kernels.tiles.choose("hopper", "sums", torch.float16, D).DP == DP
    assert kernels.tiles.choose("interpreter", "sums", torch.float32, D).DP == DP
    sets = some_sets(1, 2, 40, D)
    found, wanted = (module.forward(sets, 0.1, True, False) for module in (tk.backends.triton, kernels.small))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(
    "tau, cross, normalize", [(0.2, False, True), (torch.tensor(0.005), True, True), (1.0, False, False)]
)
@pytest.mark.parametrize("D, DP", [(100, 128), (150, 192), (300, 320), (384, 384), (400, 512)])
def test_gradients_of_features_in_several_parts_are_accurate(
    D, DP, tau, cross, normalize, splits, kernels, monkeypatch
):
    for table, dtype in (("hopper", torch.float16), ("interpreter", torch.float32)):
        assert kernels.tiles.choose(table, "gradient", dtype, D).DP == DP
    if splits:
        monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", 40))
    sets = [z / (1 if normalize else math.sqrt(D)) for z in some_sets(1, 2, 70, D)]
    assert deviation(tk.backends.triton, sets, tau, normalize, cross) < 1e-5 * max(1, 0.05 / float(tau))


@pytest.mark.parametrize("D", [150, 300])
@pytest.mark.parametrize("name", ["rectangle", "keys of sets"])
def test_rectangles_of_features_in_several_parts_are_accurate(name, D, kernels):
    assert general_deviation(kernels.rectangle, PROBLEMS[name]._replace(D=D), 0.2) < 1e-5


@pytest.mark.parametrize("tau", [0.2, torch.tensor(0.2), torch.tensor(0.005)])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(
    "dtype, G, V", [(torch.float32, 1, 2), pytest.param(torch.float64, 3, 3, marks=pytest.mark.full)], ids=str
)
def test_gradients_from_matrix_products_of_the_library_are_accurate(dtype, G, V, cross, tau, kernels, monkeypatch):
    """The products are in chunks of rows, or of several groups."""
    tiny(kernels, monkeypatch)
    monkeypatch.setattr(kernels.wide, "NARROWEST", 4)
    monkeypatch.setattr(kernels.wide, "FEWEST", 32)
    monkeypatch.setattr(kernels.wide, "ENTRIES", 20000 if G > 1 else 1)
    sets = [z.to(dtype) for z in some_sets(G, V, 50, 12)]
    tolerance = 1e-5 * max(1, 0.05 / float(tau)) if dtype == torch.float32 else 1e-10
    assert deviation(tk.backends.triton, sets, tau, cross=cross) < tolerance


def test_columns_are_split_where_rows_are_few(kernels):
    """A program takes 64 rows, and each of 132 multiprocessors runs two programs."""

    def splits(M, alone=1.5):
        return kernels.large.splits_of(M // 64, 132, alone, M // 128, 2)[0]

    assert [splits(M) for M in (1024, 4096, 8192, 16384, 32768, 131072)] == [8, 4, 2, 1, 1, 1]
    for M in range(128, 300_000, 640):
        count, tiles_per_split = kernels.large.splits_of(M // 64, 132, 1.0, M // 128, 2)
        assert count == math.ceil(M // 128 / tiles_per_split)
        assert count == 1 or count * (M // 64) <= 4 * 132
    assert kernels.large.splits_of(800, 132, 1.5, 2, 2)[0] == 1  # with many groups, columns are not split


@pytest.mark.parametrize("table", ["hopper", "blackwell", "ampere", "compact", "amd", "interpreter"])
def test_bounded_and_unbounded_gradient_tiles_have_equal_shapes(table, kernels):
    choose = kernels.tiles.choose
    for D in (1, 16, 33, 64, 128, 200, 256, 512, 513, 768, 1024, 1536):
        for dtype, precision in [
            (torch.float16, "ieee"),
            (torch.float32, "ieee"),
            (torch.float32, "pairs"),
            (torch.float32, "tf32"),
            (torch.float64, "ieee"),
        ]:
            tile = choose(table, "gradient", dtype, D, precision)
            names = [f"gradient{more}" for more in (" unbounded", " split", " unbounded split")]
            others = [choose(table, name, dtype, D, precision) for name in names]
            for other in others:
                assert (tile.BM, tile.BN, tile.DP, tile.DC) == (other.BM, other.BN, other.DP, other.DC)
            assert tile.BM % 16 == 0  # needed by join_kernel
            for one in (tile, *others, choose(table, "sums", dtype, D, precision)):
                assert one.DP % one.BK == one.DP % one.DC == 0


def test_super_blocks_are_as_few_as_keep_the_device_busy(kernels):
    """The example has 131,072 rows and 132 multiprocessors."""
    size, count = kernels.large.super_blocks(2, 512, 1, 8 * 132)
    programs = 2 * count * (count + 1)
    assert size * count >= 512 and 8 * 132 <= programs <= 3 * 8 * 132


@pytest.mark.parametrize("D", [17, 40, 600])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_in_several_chunks_of_features_are_accurate(D, normalize, kernels, monkeypatch):
    if D < 512:
        tiny(kernels, monkeypatch)
    sets = [x / math.sqrt(D) for x in some_sets(1, 2, 37, D)]
    assert deviation(tk.backends.triton, sets, 0.2, normalize) < 1e-5


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.005])
def test_unbounded_kernels_with_other_tiles_are_accurate(tau, cross, kernels, monkeypatch):
    """Both use the same packed rows, and only the device knows which of the two has to work."""
    table = {"sums": (64, 32), "sums unbounded": (16, 64), "gradient": (32, 16), "gradient unbounded": (32, 16)}
    table = {kernel: [(1 << 30, BM, BN, 16, 16, 4, 1)] for kernel, (BM, BN) in table.items()}
    monkeypatch.setitem(kernels.tiles.TABLES, "interpreter", {"float": table})
    sets = some_sets(1, 3, 150, 5)
    assert deviation(tk.backends.triton, sets, torch.tensor(tau), cross=cross) < 1e-4 * max(1, 0.01 / tau)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("enough", [1, 16, 10**6])
def test_tiles_wider_than_high_are_accurate(enough, tau, cross, kernels, monkeypatch):
    """Autotuning may choose such tiles."""
    tiny(kernels, monkeypatch, BM=16, BN=64)
    of_size = kernels.large.super_blocks
    monkeypatch.setattr(kernels.large, "super_blocks", lambda V, blocks, G, _: of_size(V, blocks, G, enough))
    assert deviation(tk.backends.triton, some_sets(1, 3, 71, 5), tau, cross=cross) < 1e-4 * max(1, 0.01 / tau)


def test_tf32_uses_its_own_tiles_if_it_is_allowed(kernels, monkeypatch):
    tiny(kernels, monkeypatch, kinds=("tf32",))
    sets = some_sets(1, 2, 20, 130)
    with pytest.raises(KeyError):
        tk.backends.triton.forward(sets, 0.1, True, False)
    monkeypatch.setattr(kernels.large, "tf32_allowed", lambda: True)
    assert deviation(tk.backends.triton, sets, 0.1) < 2e-3


def as_tf32(x, nearest):
    """A float32 array with TF32's 11 bits, which is rounded if `nearest`, otherwise truncated."""
    return ((x.view(np.int32) + nearest * (1 << 12)) & -(1 << 13)).view(np.float32)


@pytest.fixture
def tensor_cores(kernels, monkeypatch):
    """Makes float32 products truncate their operands to TF32, as tensor cores do if TF32 is allowed."""
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self, a, b, d, *settings):
        cut = (interpreter.TensorHandle(as_tf32(x.data.copy(), False), x.dtype.scalar) for x in (a, b))
        return multiply(self, *cut, d, *settings)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(kernels.large, "tf32_allowed", lambda: True)


def test_few_features_use_float16_pairs_even_if_tf32_is_allowed(kernels, monkeypatch):
    monkeypatch.setattr(kernels.large, "tf32_allowed", lambda: True)
    assert deviation(tk.backends.triton, some_sets(1, 2, 40, 128), 0.1) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_float16_pairs_hold_22_bits_of_unit_rows(scale, kernels):
    rows = [scale * x * 10.0 ** torch.linspace(-8, 0, 40) for x in some_sets(1, 1, 30, 40)]
    z, _, halves, lower = kernels.large.packed(rows, True, 64, 64)
    assert halves.dtype == torch.float16 and lower == z.numel()
    off = halves.double().sum(0) - 4096 * z.double()
    assert (off.abs() <= 4096 * z.double().abs() * 2**-22 + 2**-25).all()


def test_tf32_errs_no_more_than_rounded_operands_do(tensor_cores, monkeypatch):
    """Truncated operands are all too small. If they were not rounded before, the loss would be off by 2e-3."""
    inputs = LOSSES["nt_xent"].inputs((64, 2, 130), torch.float32)
    mean = functools.partial(tk.nt_xent, temperature=0.1)
    found, gradients = run(functools.partial(mean, backend="triton"), inputs)
    exact = [x.double() for x in inputs]
    wanted, wanted_gradients = run(functools.partial(mean, backend="reference"), exact)
    unit = [x / x.norm(dim=1, keepdim=True) for x in exact]
    rounded = [torch.from_numpy(as_tf32(x.float().numpy(), True)).double() for x in unit]
    value, slopes = run(functools.partial(mean, backend="reference", normalize=False), rounded)
    assert abs(found - wanted) < 4 * abs(value - wanted) + 1e-6
    for x, u, g, slope, w in zip(exact, unit, gradients, slopes, wanted_gradients, strict=True):
        along = (slope * u).sum(1, keepdim=True)
        emulated = (slope - along * u) / x.norm(dim=1, keepdim=True)
        assert oracle.rms(g, w) < 4 * oracle.rms(emulated, w)
        assert abs((g.double() * w).sum() / w.square().sum() - 1) < 1e-4  # truncated weights would make it too short


@pytest.mark.parametrize("entry", [math.nan, math.inf, 3.4028e38, 1e36, -0.0, 1e-40])
def test_tf32_rounding_makes_no_finite_term_infinite(entry, tensor_cores):
    rows = torch.zeros(2, 40, 8)
    rows[:, :, 0], rows[0, 3, 1] = 1.0, entry
    tau = torch.tensor(1.0, requires_grad=True)
    terms = tk.nt_xent(*rows, temperature=tau, normalize=False, reduction="none", backend="triton")
    wanted = tk.nt_xent(*rows, temperature=1.0, normalize=False, reduction="none", backend="reference")
    assert torch.equal(terms.isfinite(), wanted.isfinite())


def test_tf32_uses_the_tiles_of_float_if_it_has_none(kernels):
    assert "tf32" not in kernels.tiles.TABLES["amd"]
    found, wanted = (kernels.tiles.choose("amd", "gradient", torch.float32, 64, how) for how in ("tf32", "ieee"))
    assert found == wanted


def test_autotuning_keeps_the_fastest_tile_of_each_kind_of_call(kernels, monkeypatch):
    """It tries the table's tile and its neighbours once for every kind of call, and all of them give right results."""
    tried = []

    def milliseconds(step):
        step()
        return -tile_of(tried[-1])

    def tile_of(launched):
        return launched["BM"] + launched["BN"] + launched["num_stages"]

    launch = kernels.large.launch

    def noted(kernel, *arguments, **settings):
        if "BN" in settings:
            tried.append(settings)
        launch(kernel, *arguments, **settings)

    monkeypatch.setattr(kernels.large, "launch", noted)
    monkeypatch.setattr(kernels.tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(kernels.tuning, "fastest", {})
    monkeypatch.setattr(kernels.tuning, "ENABLED", True)
    sets = some_sets(1, 2, 37, 5)
    assert deviation(tk.backends.triton, sets, 0.1) < 1e-5
    assert {name for name, *_ in kernels.tuning.fastest} == {"sums", "gradient"}
    assert {(s["BM"], s["BN"]) for s in tried} == {(64, 64), (128, 64), (64, 32), (64, 128)}
    count = len(tried)
    assert deviation(tk.backends.triton, sets, 0.1) < 1e-5
    assert len(tried) == count + 2 and all(tile_of(s) == max(map(tile_of, tried)) for s in tried[-2:])


def test_tiles_found_by_trial_are_not_used_for_rows_padded_to_another_width(kernels, monkeypatch):
    monkeypatch.setattr(kernels.tuning, "milliseconds", lambda step: 0)
    monkeypatch.setattr(kernels.tuning, "fastest", {})
    monkeypatch.setattr(kernels.tuning, "ENABLED", True)
    for D in (150, 250, 130):
        assert deviation(tk.backends.triton, some_sets(1, 2, 37, D), 0.1) < 1e-5


@pytest.mark.parametrize("tau", [10.0, 0.1, 1 / 59, 1 / 61, 0.002])
def test_a_temperature_gives_the_same_result_as_a_tensor_or_a_number(tau, kernels):
    """The temperatures are on both sides of the limit from which on sums need a running maximum."""
    a, b = LOSSES["nt_xent"].inputs((40, 2, 8), torch.float32)
    number = run(lambda *z: tk.nt_xent(*z, temperature=tau, backend="triton"), [a, b])
    tensor = run(lambda *z: tk.nt_xent(*z, temperature=torch.tensor(tau), backend="triton"), [a, b])
    tolerance = max(1e-5, 2e-7 / tau)  # the interpreter divides in float64 and rounds again
    torch.testing.assert_close(tensor, number, rtol=tolerance, atol=tolerance)


def test_the_addresses_of_the_sets_change_no_bit(kernels):
    together = torch.stack(some_sets(2, 3, 20, 6), 1)
    apart = [together[:, k].clone() for k in (2, 0, 1)]
    apart = [apart[1], apart[2], apart[0]]
    for sets in (list(together.unbind(1)), apart, [apart[0], apart[1].mT.contiguous().mT, apart[2]]):
        x, strides = kernels.sets.one_array(sets)
        inner, outer_step, step, *others = strides
        places = [k // inner * outer_step + k % inner * step for k in range(3)]
        assert [x.data_ptr() + 4 * place for place in places] == [s.data_ptr() for s in sets] or x.dim() == 4
        assert x.dim() == 3 or torch.equal(x, torch.stack(sets))
        results = tk.backends.triton.forward(sets, 0.1, True, False)
        wanted = tk.backends.triton.forward([s.contiguous() for s in together.unbind(1)], 0.1, True, False)
        assert all(torch.equal(f, w) for f, w in zip(results, wanted, strict=True))


# ---- bits, launches and memory


@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("cross", [False, True])
def test_uninitialised_memory_changes_no_bit(cross, tau, kernels, monkeypatch):
    """With deterministic algorithms, PyTorch fills new tensors with NaN."""
    tiny(kernels, monkeypatch)
    monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", 6))
    sets = some_sets(2, 3, 45, 5)
    upstream = torch.rand(2, 3, 3, 45)
    results = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        try:
            term, neg, pos = tk.backends.triton.forward(sets, tau, True, cross)
            dx, zdz = tk.backends.triton.backward(sets, tau, True, cross, neg, pos, upstream, None, None)
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([term, neg, pos, *dx, zdz])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def launches(case, table="hopper"):
    from benchmarks.compile_triton import recorded

    return recorded(case, table)


def test_launches_and_memory_of_large_and_small_problems_are_as_expected(kernels):
    from benchmarks.compile_triton import Case

    large = launches(Case(1, 2, 65536, 128, torch.bfloat16))
    assert [launch.kernel.__name__ for launch in large] == [
        *("rows_kernel", "sums_kernel", "finish_kernel", "rows_kernel", "coefficients_kernel", "gradient_kernel"),
    ]
    held = {id(x): x for launch in large for x in launch.arguments.values() if isinstance(x, torch.Tensor)}
    assert sum(x.nbytes for x in held.values()) < 0.45 * 2**30  # including the inputs and the gradient
    assert [launch.kernel.__name__ for launch in launches(Case(1, 2, 2048, 128, torch.bfloat16))][6:] == ["join_kernel"]
    assert len(launches(Case(40, 2, 4, 128, torch.float32))) == 2


def test_random_inputs_on_the_large_path_are_within_the_tolerance(only_large):
    assert fuzz.failing(range(10000, 10060), "triton") == []


# ---- the operation in its general form


def general_deviation(module, problem, tau, dtype=torch.float32):
    """As `deviation`, for a problem of test_general.py: the values, the gradients of both sides and that of tau."""
    rows, columns = problem.sets(dtype)
    settings = tau, problem.normalize, problem.cross, -1 if problem.first is None else problem.first, *problem.keys()
    exact = [[x.double() for x in side] for side in (rows, columns)]
    number = float(tau)
    wanted, slopes = test_general.run(problem.formula, exact, number)
    found = module.forward(rows, columns, *settings, False)
    upstream = [oracle.some_gradient(x.shape, k).where(x.isfinite(), 0) for k, x in enumerate(wanted)]
    of_rows = [found[0], *upstream[:2]] + ([found[2], *upstream[2:], found[4]] if problem.classes else [])
    d_rows, d_columns, along = module.backward(rows, columns, *settings, of_rows, [], True, bool(rows))
    d_tau = along.double().sum() / (-number if rows else -2 * number)
    pairs = [*zip(found, wanted, strict=False), *zip([*d_rows, *d_columns, d_tau], slopes, strict=True)]
    return max(oracle.error(f, w) / test_general.largest(w) for f, w in pairs)


BLOCKS = {  # problems with several blocks of rows and columns, if tiles are 32 x 16
    "rectangle": Problem(1, n=35, K=60),
    "range": Problem(1, A=2, n=20, C=2, K=60, first=33),
    "range, cross": Problem(1, A=3, n=20, C=3, K=40, first=9, cross=True),
    "keys": Problem(2, n=35, K=50, D=20, classes=4),
    "keys of a range": Problem(1, A=2, n=18, C=2, K=50, first=17, classes=3),
    "keys of sets": Problem(1, A=2, n=45, C=2, K=45, first=0, classes=6, symmetric=True),
}


@pytest.mark.parametrize("name, processors", [*((name, 40) for name in BLOCKS), ("keys", 1), ("range", 1)])
def test_rectangles_in_many_blocks_and_splits_are_accurate(name, processors, kernels, monkeypatch):
    tiny(kernels, monkeypatch)
    monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", processors))
    assert general_deviation(kernels.rectangle, BLOCKS[name], 0.2) < 1e-5


@pytest.mark.parametrize("D, normalize", [(40, True), (600, False)])
def test_rectangles_in_several_chunks_of_features_are_accurate(D, normalize, kernels, monkeypatch):
    if D < 512:
        tiny(kernels, monkeypatch)
    for name in ("rectangle", "keys of sets"):
        assert general_deviation(kernels.rectangle, PROBLEMS[name]._replace(D=D, normalize=normalize), 0.2) < 1e-5


@pytest.mark.parametrize("tau", [0.2, 0.005])
def test_rectangles_with_a_temperature_tensor_are_accurate(tau, kernels):
    for dtype in (torch.float32, torch.float64):
        assert general_deviation(kernels.rectangle, PROBLEMS["keys"], torch.tensor(tau, dtype=dtype)) < 1e-6 / tau


@pytest.mark.parametrize("D", [24, 150, 600])
def test_the_weighted_mean_of_the_columns_is_accurate(D, kernels, monkeypatch):
    """The gradient of the rows uses it if the columns need no gradient."""
    monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", 40))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13), (torch.float16, 2e-3)):
        rows, columns = Problem(1, n=20, K=150, D=D).sets(dtype)
        neg, *_, mean = kernels.rectangle.forward(rows, columns, 0.1, True, False, -1, None, None, True)
        r, z = (reference.unit_rows(x[0].double()) for x in (rows, columns))
        wanted = torch.softmax(r @ z.mT / 0.1, -1) @ z
        assert mean.dtype == torch.promote_types(dtype, torch.float32) and oracle.error(mean, wanted) < bound


def test_gradients_scale_with_upstream_gradients_of_every_size(kernels):
    """They are computed in units of a power of two near the largest gradient of a group."""
    problem = PROBLEMS["keys"]
    rows, columns = problem.sets(torch.float64)
    settings = 0.2, True, False, -1, *problem.keys()
    neg, _, pos_lse, _, count, _ = kernels.rectangle.forward(rows, columns, *settings, False)
    first = None
    for g in (1e-250, 1e-30, 1.0, 1e200):
        rest = torch.zeros_like(neg), pos_lse, g / 2 * torch.ones_like(neg), torch.zeros_like(neg), count
        results = kernels.rectangle.backward(
            rows, columns, *settings, [neg, g * torch.ones_like(neg), *rest], [], True, True
        )
        shares = torch.cat([x.flatten() / g for x in results])
        first = shares if first is None else first
        torch.testing.assert_close(shares, first)


def test_autotuning_tries_the_tiles_of_each_kind_of_rectangle_once(kernels, monkeypatch):
    """The last tile is made the fastest, so that it is used then, and its results are right."""
    tried = []

    def milliseconds(step):
        step()
        tried.append(None)
        return -len(tried)

    monkeypatch.setattr(kernels.tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(kernels.tuning, "fastest", {})
    monkeypatch.setattr(kernels.tuning, "ENABLED", True)
    for _ in range(2):
        assert general_deviation(kernels.rectangle, BLOCKS["keys of a range"], 0.2) < 1e-5
        rows, columns = BLOCKS["rectangle"].sets(torch.float32)
        kernels.rectangle.forward(rows, columns, 0.2, True, False, -1, None, None, True)
    assert [name[1].__name__ for name in kernels.tuning.fastest] == ["forward", "backward", "forward"]
    assert len(tried) == sum(len(kernels.tuning.neighbours(tile)) for tile in tried_from(kernels))


def tried_from(kernels):
    """The tiles from which autotuning starts for three kinds of calls."""
    x = BLOCKS["rectangle"].sets(torch.float32)[1][0]
    named = ("sums", True), ("gradient", True), ("gradient", False)
    return [kernels.rectangle.from_table(kernel, x, True, keys) for kernel, keys in named]


@pytest.mark.parametrize("labelled", [False, True])
def test_uninitialised_memory_changes_no_bit_of_a_rectangle(labelled, kernels, monkeypatch):
    tiny(kernels, monkeypatch)
    monkeypatch.setattr(kernels.large, "table_of", lambda x: ("interpreter", 40))
    problem = Problem(2, A=2, n=21, C=2, K=50, first=9, classes=3 * labelled)
    rows, columns = problem.sets(torch.float32)
    settings = 0.1, True, False, 9, *problem.keys()
    results = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        try:
            outputs = kernels.rectangle.forward(rows, columns, *settings, False)
            ones = torch.ones_like(outputs[0])
            of_rows = [outputs[0], ones, ones, *([outputs[2], ones, ones, outputs[4]] if labelled else [])]
            gradients = kernels.rectangle.backward(rows, columns, *settings, of_rows, [], True, True)
            pairs = kernels.rectangle.pairs(rows, columns, *settings, outputs[0]) if labelled else ()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([*outputs, *gradients, *pairs])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_no_columns_or_no_rows_give_empty_sums_and_zero_gradients(kernels):
    for n, K in ((0, 5), (5, 0)):
        rows, columns = [torch.ones(2, n, 3)], [torch.ones(2, K, 3)]
        keys = torch.zeros(2, n, dtype=torch.int64), torch.zeros(2, K, dtype=torch.int64)
        settings = rows, columns, 0.1, True, False, -1, *keys
        neg, pos, pos_lse, spread, count, _ = tk.backends.triton.rectangle(*settings, False)
        assert neg.shape == pos.shape == (2, 1, 1, n) and (neg == -math.inf).all() and (pos_lse == -math.inf).all()
        assert not pos.any() and not spread.any() and not count.any()
        assert not tk.backends.triton.pairs(*settings, neg)[0].any()
        anchors = [neg] * 7, []
        (d_rows,), (d_columns,), along = tk.backends.triton.rectangle_backward(*settings, *anchors, True, True)
        assert not d_rows.any() and not d_columns.any() and along.shape == (2, 1, n)
        assert d_rows.shape == rows[0].shape and d_columns.shape == columns[0].shape


# ---- PyTorch's tools


@pytest.mark.parametrize("tau", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("N", [5, 20])
def test_the_operators_pass_pytorchs_opcheck(N, cross, tau, kernels):
    ops = torch.ops.tclr_kernels_triton
    sets = some_sets(2, 2, N, 3)
    tau = (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)
    torch.library.opcheck(ops.gram_forward.default, (sets, *tau, True, cross))
    term, neg, pos = ops.gram_forward(sets, *tau, True, cross)
    torch.library.opcheck(ops.gram_backward.default, (sets, *tau, True, cross, neg, pos, term, None, None))


@pytest.mark.parametrize("name", ["rectangle", "keys of a range"])
def test_the_rectangle_operators_pass_pytorchs_opcheck(name, kernels):
    ops, problem = torch.ops.tclr_kernels_triton, PROBLEMS[name]
    rows, columns = problem.sets(torch.float32)
    first = -1 if problem.first is None else problem.first
    settings = rows, columns, torch.tensor(0.1), 0.0, True, False, first, *problem.keys()
    torch.library.opcheck(ops.rectangle.default, (*settings, name == "rectangle"))
    neg, pos, pos_lse, spread, count, _ = ops.rectangle(*settings, False)
    of_rows = [neg, pos, pos, *([pos_lse, pos, spread, count] if problem.classes else [])]
    torch.library.opcheck(ops.rectangle_backward.default, (*settings, of_rows, [], True, bool(rows)))
    if problem.classes:
        torch.library.opcheck(ops.pairs.default, (*settings, pos))


# ---- planted bugs


def check_small(planted):
    for (G, V, N, D), cross in itertools.product([(5, 2, 4, 9), (2, 3, 5, 3)], [False, True]):
        assert deviation(planted.small, some_sets(G, V, N, D), 0.2, cross=cross) < 1e-5


def check_large(planted):
    for V, cross in itertools.product([2, 3], [False, True]):
        assert deviation(planted.large, some_sets(1, V, 75, 5), 0.2, cross=cross) < 1e-5


def check_large_unbounded(planted):
    for cross in (False, True):
        assert deviation(planted.large, some_sets(1, 2, 41, 5), 0.005, cross=cross) < 1e-4


def check_beyond(planted):
    """Rows that are far from all others. Their weights for the padding overflow float16."""
    x = torch.tensor([[[3.0, 1, -2, 0.5], [-3, -1, 2, -0.4]]])
    assert deviation(planted.large, [x, x + 0.01], 1 / 30) < 1e-4


def check_halves(planted):
    """Gradients with so many features that they are computed in halves."""
    planted.tiles.TABLES["interpreter"]["float"]["gradient"] = [(1 << 30, 32, 16, 64, 0, 4, 1)]
    for V, cross in itertools.product([2, 3], [False, True]):
        assert deviation(planted.large, some_sets(1, V, 35, 200), 0.2, cross=cross) < 1e-5


def check_parts(planted):
    """Rows of several tensors."""
    planted.tiles.TABLES["interpreter"]["float"]["gradient"] = [(1 << 30, 32, 16, 0, 0, 4, 1)]
    assert deviation(planted.large, some_sets(1, 2, 35, 150), 0.2) < 1e-5


def check_splits(planted):
    """Several programs work on the same rows, each with some of the columns and features."""
    planted.large.table_of = lambda x: ("interpreter", 60)
    for D in (12, 40):
        assert deviation(planted.large, some_sets(1, 2, 50, D), 0.2) < 1e-5


def check_groups_stay_apart(planted):
    sets = some_sets(4, 2, 4, 6)
    sets[0][1, 2, 3] = math.nan
    term, neg, pos = planted.small.forward(sets, 0.1, True, False)
    dx, _ = planted.small.backward(sets, 0.1, True, False, neg, pos, torch.ones_like(term), None, None)
    assert dx[:, [0, 2, 3]].isfinite().all() and term[[0, 2, 3]].isfinite().all() and dx[0, 1].isnan().any()


def check_confident_small_rows(planted):
    """The weights are below float32's range, but the rows are so short that their gradients are not."""
    tau = 1 / 150
    for module in (planted.small, planted.large):
        rows = 1e-36 * torch.eye(10)[None]
        exact = [rows.double().requires_grad_() for _ in range(2)]
        reference.gram(exact, tau, True, False)[0].sum().backward()
        assert exact[0].grad.abs().max() > 1e-30
        _, neg, pos = module.forward([rows, rows], tau, True, False)
        dx, _ = module.backward([rows, rows], tau, True, False, neg, pos, torch.ones_like(neg), None, None)
        assert oracle.error(dx[0], exact[0].grad) < 1e-2 * exact[0].grad.abs().max()


def check_not_finite_rows(planted):
    """With a NaN in the group, a zero row still has gradient 0, and all other rows have NaN."""
    a, b = (x[0] for x in some_sets(1, 2, 5, 6))
    a[0], a[1, 2] = 0, math.nan
    for module in (planted.small, planted.large):
        term, neg, pos = module.forward([a[None], b[None]], 0.1, True, False)
        dx, _ = module.backward([a[None], b[None]], 0.1, True, False, neg, pos, torch.ones_like(term), None, None)
        assert not dx[0, 0, 0].any() and dx[0, 0, 1:].isnan().all() and dx[1].isnan().all()


def check_rectangle(planted):
    """Ranges and labels, with columns that are split."""
    planted.large.table_of = lambda x: ("interpreter", 40)
    for name in ("range, cross", "keys of a range"):
        assert general_deviation(planted.rectangle, BLOCKS[name], 0.2) < 1e-5


def check_symmetric(planted):
    assert general_deviation(planted.rectangle, BLOCKS["keys of sets"]._replace(n=20, K=20), 0.2) < 1e-5


def check_unlabelled(planted):
    """Rows without labels, and those without partners."""
    z = some_sets(1, 1, 20, 5)[0]
    keys = torch.tensor([[-1, -2] + [0] * 3 + [1] * 3 + [2] * 5 + [3] * 3 + [5] + [4] * 3])
    settings = 0.2, True, False, 0, keys, keys
    neg, _, pos_lse, spread, count, _ = planted.rectangle.forward([], [z], *settings, False)
    exact = reference.rectangle([], [z.double()], *settings)
    assert all(
        oracle.error(f, w) < 1e-5 for f, w in zip((neg, pos_lse, spread, count), (exact[0], *exact[2:]), strict=True)
    )
    ones = torch.ones_like(neg)
    of_rows = [neg, 0 * ones, 0 * ones, pos_lse, 0 * ones, ones, count]
    dr, *_ = planted.rectangle.backward([], [z], *settings, of_rows, [], True, False)
    alone = count[0, 0, 0] == 0
    assert alone.sum() == 3 and not dr[0, 0, alone].any() and dr[0, 0, ~alone].any(-1).all()


def check_pairs(planted):
    problem = BLOCKS["keys"]
    rows, columns = problem.sets(torch.float32)
    settings = 0.2, True, False, -1, *problem.keys()
    negatives = 3 * torch.randn(2, 1, 1, 35, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = [x.double().requires_grad_() for x in (*rows, *columns, negatives)]
    wanted = reference.pairs(exact[:1], exact[1:2], *settings, exact[2])
    upstream = oracle.some_gradient(wanted.shape)
    gradients = torch.autograd.grad(wanted, exact, upstream)
    found, slope = planted.rectangle.pairs(rows, columns, *settings, negatives)
    dr, dz, _ = planted.rectangle.backward(rows, columns, *settings, [negatives, upstream], [], True, True)
    assert oracle.error(found, wanted.detach()) < 1e-5 * wanted.max()
    for f, w in zip((dr[0], dz[0], upstream * slope), gradients, strict=True):
        assert oracle.error(f, w) < 1e-5 * w.abs().max()


CHECKS = dict(
    rectangle=check_rectangle,
    symmetric=check_symmetric,
    unlabelled=check_unlabelled,
    pairs=check_pairs,
    small=check_small,
    large=check_large,
    beyond=check_beyond,
    halves=check_halves,
    parts=check_parts,
    splits=check_splits,
    unbounded=check_large_unbounded,
    groups=check_groups_stay_apart,
    not_finite=check_not_finite_rows,
    confident=check_confident_small_rows,
)
BUGS = {  # what is wrong -> (file, old, new, the check that finds it)
    "small: dropped mask": ("small", "other = group & (i[:, None] != i[None, :])", "other = group", "small"),
    "small: groups mixed": ("small", "group = (g[:, None] == g[None, :]) &", "group =", "small"),
    "small: missing factor 2": ("small", "W += tl.trans(W)", "W += W", "small"),
    "small: not finite beside zeros": ("small", 'tl.where(tl.abs(z) < float("inf"), z, 0.0)', "z", "groups"),
    "zero row beside one that is not finite": ("epilogue", "tl.where(norm[:, None] == 0, 0.0, ", "(", "not_finite"),
    "zero by a factor too small for float32": ("epilogue", "norm[:, None] == 0", "other[:, None] == 0", "not_finite"),
    "small: no projection": ("small", "dz -= z * along[:, None]", "dz -= 0", "small"),
    "own negatives forgotten": ("epilogue", "for_own += tl.where", "for_own = 0 * tl.where", "small"),
    "wrong power of tau": ("epilogue", "(unit * inverse_tau)", "(unit * inverse_tau * inverse_tau)", "large"),
    "unit forgotten": ("epilogue", "scale = (unit * inverse_tau)", "scale = (inverse_tau)", "large"),
    "the unit always 1": (
        "epilogue",
        "tl.maximum(((bits >> 52) & 2047) - 1023, -1000)",
        "((bits >> 52) & 0)",
        "confident",
    ),
    "large: dropped mask": ("large", "(i[:, None] != j[None, :]) & (i < last)", "(i < last)", "large"),
    "large: ragged rows counted": ("large", "& (i < last)[:, None] & (j", "& (j", "large"),
    "large: ragged columns counted": ("large", "& (j < last)[None, :], s", ", s", "large"),
    "large: itself in the gradient": (
        "large",
        "[:, None] != k[None, :]) &",
        "[:, None] != k[None, :] - BN) &",
        "large",
    ),
    "large: weights beyond the last row": ("large", "& (k < N - begin)[None, :], w", ", w", "beyond"),
    "large: rows' sums begun anew": ("large", "again = tl.where(start > first_j, NP, 0)", "again = 0", "large"),
    "large: positives from some of the features only": ("large", "positive += tl.sum", "positive = tl.sum", "splits"),
    "large: lower halves forgotten": (
        "large",
        "right[1], small, out_dtype=ACC)",
        "right[1], out_dtype=ACC) * 0",
        "large",
    ),
    "large: gradients of float16 pairs not divided by their unit": (
        "large",
        "dz = times(dz, 1.0 / UNIT)",
        "dz = times(dz, 1.0)",
        "large",
    ),
    "large: the first part of a row instead of another": ("large", "operand(u + k * WIDEST,", "operand(u,", "parts"),
    "large: similarities of the first part only": (
        "large",
        "s = tl.fma(more, one, s)",
        "s = tl.fma(more, one * 0, s)",
        "parts",
    ),
    "large: parts stored at one place": ("large", "else d + part * WIDEST", "else d", "parts"),
    "large: a pair left out": ("large", "(one >= step), -1, q)", "(one >= 0), -1, q)", "large"),
    "large: slots of rows and columns swapped": ("large", "(g * supers + q) * M", "(g * supers + p) * M", "large"),
    "large: earlier sums not rescaled": ("large", "total * exponential(top - offset) +", "total +", "unbounded"),
    "large: missing factor 2": ("large", "(row_scale[:, None] + scale[None, :])", "row_scale[:, None]", "large"),
    "large: missing factor 2, unbounded": ("large", "w += exponential", "w = exponential", "unbounded"),
    "large: one sided positive": ("large", "weight += tl.load", "weight += 0 * tl.load", "large"),
    "large: halves exchanged": ("large", "d % RUN + part * RUN", "d % RUN + (1 - part) * RUN", "halves"),
    "large: <z, dz> from half of the features only": ("large", "along += tl.sum(own", "along = tl.sum(own", "halves"),
    "large: columns in two splits": ("large", "tl.minimum(start_j + columns_per_split, N)", "N", "splits"),
    "large: a split forgotten": ("large", "for split in range(splits)", "for split in range(splits - 1)", "splits"),
    "large: <z, dz> of one split only": ("large", "along += tl.load(partial_", "along = tl.load(partial_", "splits"),
    "large: damping forgotten": ("large", "tl.exp(-value * bounded)", "1.0", "large"),
    "large: exponents of another block": (
        "large",
        "factor_at(exponents + column_block * blocks + start // BN, top, ACC) * BOOST",
        "BOOST",
        "large",
    ),
    "rectangle: the same index counted": (
        "rectangle",
        "s = tl.where(index, float",
        "s = tl.where(index & False, float",
        "rectangle",
    ),
    "rectangle: ragged columns counted": (
        "rectangle",
        "s = tl.where((j < end)[None, :]",
        "s = tl.where((j >= 0)[None, :]",
        "rectangle",
    ),
    "rectangle: the anchor itself a positive": ("rectangle", "positive & ~(index & alike)", "positive", "symmetric"),
    "rectangle: rows without keys count as alike": ("rectangle", "tl.where(key < 0, none, key)", "key", "unlabelled"),
    "rectangle: spread without positives not zero": (
        "rectangle",
        "tl.where(number > 0, apart, 0.0)",
        "apart + 1",
        "unlabelled",
    ),
    "rectangle: earlier sum not rescaled": (
        "rectangle",
        "total * exponential(largest - finite(top))",
        "total",
        "rectangle",
    ),
    "rectangle: a part of the sum of S": ("rectangle", "similarity += tl.sum", "similarity = tl.sum", "rectangle"),
    "rectangle: the spread's share not subtracted": (
        "rectangle",
        "* (e - tl.expand_dims(fields[5], axis))",
        "* e",
        "rectangle",
    ),
    "rectangle: spread's share of pos_lse": (
        "rectangle",
        "(of_spread * scale).to(ACC)",
        "(of_lse * scale).to(ACC)",
        "rectangle",
    ),
    "rectangle: the weights of one side only": (
        "rectangle",
        "w += weights(s, positive, y_fields",
        "w = weights(s, positive, y_fields",
        "symmetric",
    ),
    "rectangle: a split forgotten": (
        "rectangle",
        "for split in range(splits):\n        dz",
        "for split in range(splits - 1):\n        dz",
        "rectangle",
    ),
    "rectangle: columns in two splits": ("rectangle", "tl.minimum(start_j + columns_per_split, K)", "K", "rectangle"),
    "rectangle: no projection": ("rectangle", "dz -= own * length[:, None]", "dz -= 0", "rectangle"),
    "rectangle: partner of another index": ("rectangle", "+ begin + offset) * DP", "+ begin) * DP", "rectangle"),
    "rectangle: beta of another row": ("rectangle", "* KP + partner, mask", "* KP + i, mask", "rectangle"),
    "rectangle: wrong slope of pair_sum": (
        "rectangle",
        "tl.where(t > 0, 1.0, e) / (1.0 + e), 0.0), 1)",
        "tl.where(t > 0, e, 1.0) / (1.0 + e), 0.0), 1)",
        "pairs",
    ),
    "large: own block in cross": (
        "large",
        "half = (V + 1) // 2\n        first = tl",
        "half = 0\n        first = tl",
        "large",
    ),
}


@pytest.fixture
def plant(kernels, tmp_path, monkeypatch):
    """Copies the kernels as another package with tiny tiles, in which a text can be replaced."""

    def planted(file=None, old="", new=""):
        name = f"planted_{tmp_path.name}_{len(list(tmp_path.iterdir()))}".replace("-", "_")
        shutil.copytree(ROOT / "tclr_kernels" / "triton", tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file is not None:
            path = tmp_path / name / f"{file}.py"
            assert old in path.read_text(), f"nothing to replace: {old!r}"
            path.write_text(path.read_text().replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        package = importlib.import_module(name)
        for module in ("small", "large", "rectangle", "tiles"):
            importlib.import_module(f"{name}.{module}")
        tiny(package, monkeypatch)
        of_size = package.large.super_blocks
        monkeypatch.setattr(package.large, "super_blocks", lambda V, blocks, G, _: of_size(V, blocks, G, 2))
        return package

    return planted


@pytest.mark.parametrize("check", CHECKS)
def test_the_unchanged_kernels_pass_every_check(check, plant):
    CHECKS[check](plant())


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, plant):
    *change, check = BUGS[bug]
    planted = plant(*change)
    with pytest.raises(AssertionError):
        CHECKS[check](planted)
