"""The CPU kernels without torch: sanitizers, the other vector widths, the order of tasks, planted bugs."""

import subprocess
import sys

import pytest
import torch

from . import kernels

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

WIDTHS = {  # as csrc/cpu/*.cpp set them; every width runs on any machine, by the compiler's generic vectors
    "portable": [],
    "avx2": ["-DTCLR_VECTOR_BYTES=32", "-DTCLR_TILE_ROWS=6"],
    "avx512": ["-DTCLR_VECTOR_BYTES=64", "-DTCLR_TILE_ROWS=12"],
}

BUGS = {
    "dropped mask": ("s[own] = -INFINITY;", ""),
    "ragged columns counted": ("j < padded<T>(columns.count); ++j) s[j] =", "j < columns.count; ++j) s[j] ="),
    "tile off by one": ("return b % blocks * block;", "return b % blocks * (block - 1);"),
    "last row missed": (
        "for (int64_t r = 0; r < rows; r += strip) {",
        "for (int64_t r = 0; r < rows - 1; r += strip) {",
    ),
    "missing maximum": ("sum = sum * ::exp(double(largest) - double(m)) + s;", "sum = sum + s;"),
    "column maximum not merged": ("exp2<T>((before - offset) * T(log2e))", "splat<T>(T(1))"),
    "wrong power of tau": ("scale = unit / in.tau", "scale = unit / (in.tau * in.tau)"),
    "missing factor 2": ("load(scale + j) + row.scale", "load(scale + j)"),
    "missing factor 2, unbounded": ("both += exp2<T>", "both = exp2<T>"),
    "swapped positive": ("group.g_pos[of_rows + q] + group.g_pos[of_columns + own]", "2 * group.g_pos[of_rows + q]"),
    "positive in the sum": (
        "s[own] = -INFINITY;",
        "if (p.set(pair.left) == p.set(pair.right)) s[own] = -INFINITY;",
    ),
    "no projection": ("projected = along", "projected = 0"),
    "a pair left out": ("if (round == 0) return {place, place};", "if (round < 2) return {place, place};"),
    "a cross pair left out": ("right < right_blocks() ?", "right + 1 < right_blocks() ?"),
    "gradient unit forgotten": ("scale = unit / in.tau", "scale = 1 / in.tau"),
    "features beyond the first panel forgotten": ("+ d * NR<T>", "+ 0 * NR<T>"),
    "the first chunk of columns twice": ("+ columns.first * w.ldz", "+ 0 * w.ldz"),
    "own negatives forgotten": ("if (!p.cross) g_own +=", "if (false) g_own +="),
    "LL: the mate among the negatives": ("c != mate) total", "true) total"),
    "LL: its scale forgotten": ("w.scale * sigmoid", "sigmoid"),
    "LL: the next clip as mate": ("a + w.V / 2", "a + 1"),
    "logarithm of one octave": ("e * ln2 +", "0 * e +"),
    "tail of a vector": ("lanes<double> ? n : lanes<double>)", "lanes<double> ? n - 1 : lanes<double>)"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return kernels.build(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_vector_width_agrees_with_the_reference(width, tmp_path):
    assert not list(kernels.deviations(kernels.Kernels(kernels.build(tmp_path, WIDTHS[width])), kernels.DTYPES))


LARGE = "many_rows = 4096", "many_rows = 64"  # blocks of two chunks of columns


def test_large_blocks_agree_with_the_reference(tmp_path):
    assert not list(kernels.deviations(kernels.Kernels(kernels.build(tmp_path, replace=[LARGE])), kernels.DTYPES))


def test_the_order_of_tasks_and_the_number_of_threads_change_no_bit(library):
    sets = [torch.randn(3, 401, 20) for _ in range(2)]
    results = []
    for threads, backwards in (1, False), (2, True), (5, False):  # up to 1 thread group by group, then many at once
        run = kernels.Kernels(library, threads, backwards)
        term, neg, pos = run.forward(sets, 0.1, True, False)
        dz, zdz = run.backward(sets, 0.1, True, False, neg, pos, torch.ones_like(term), None, None)
        results.append([term, neg, pos, *dz, zdz])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    runtime = subprocess.run([kernels.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if "/" not in runtime:
        pytest.skip("the compiler has no libasan.so")
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    library = kernels.build(tmp_path, flags)
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels", str(library)],
        env={
            "LD_PRELOAD": runtime.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": ".",
            "PATH": "/usr/bin:/bin",
        },
        cwd=kernels.CSRC.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, tmp_path):
    planted = kernels.Kernels(kernels.build(tmp_path, replace=[LARGE, BUGS[bug]]))
    assert any(kernels.deviations(planted)), f"the kernels pass with a planted bug: {bug}"
