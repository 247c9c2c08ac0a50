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
    "kept tile of another pair": ("(pair.right + 1) / 2 + pair.left", "(pair.right + 1) / 2"),
    "rows not kept": (
        "if (!w.in.keep) read(w, b);",
        "if (w.in.keep) clear(w.block(w.group.z, b), w.p.rows(b) * w.ldz, T(1));",
    ),
    "missing factor 2": ("load(scale + j) + row.scale", "load(scale + j)"),
    "missing factor 2, unbounded": ("both += exp2<T>", "both = exp2<T>"),
    "swapped positive": ("group.g_pos[of_rows + q] + group.g_pos[of_columns + own]", "2 * group.g_pos[of_rows + q]"),
    "positive in the sum": (
        "s[own] = -INFINITY;",
        "if (p.set(pair.left) == p.set(pair.right)) s[own] = -INFINITY;",
    ),
    "no projection": ("projected = along", "projected = 0"),
    "a block not met by itself": ("if (!p.cross) run_pair", "if (!p.cross && task > 0) run_pair"),
    "a pair left out": ("run_pair<T, backward>(w, pair,", "if (p.cross || round) run_pair<T, backward>(w, pair,"),
    "a cross pair left out": (
        "run_pair<T, backward>(w, pair,",
        "if (!p.cross || round) run_pair<T, backward>(w, pair,",
    ),
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


def results(library, threads, slow):
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(3, 401, 20, generator=generator) for _ in range(2)]
    run = kernels.Kernels(library, threads, slow)
    term, neg, pos = run.forward(sets, 0.1, True, False)
    dz, zdz = run.backward(sets, 0.1, True, False, neg, pos, torch.ones_like(term), None, None)
    return [term, neg, pos, *dz, zdz]


def same_for_all_threads(library):
    alone = results(library, 1, -1)
    others = (results(library, threads, slow) for threads, slow in ((2, -1), (2, 0), (3, 1), (5, 2)))
    return all(torch.equal(x, y) for other in others for x, y in zip(alone, other, strict=True))


def test_neither_the_number_of_threads_nor_a_slow_one_changes_a_bit(library):
    assert same_for_all_threads(library)


def test_threads_that_do_not_wait_for_each_other_are_found(tmp_path):
    assert not same_for_all_threads(
        kernels.build(tmp_path, replace=[("while (__atomic_load_n", "if (__atomic_load_n")])
    )


def sanitized(name, flags, arguments, folder, replace=()):
    """Runs Python with `arguments` and the kernels, built with a sanitizer, after them."""
    library = f"lib{name}.so"
    runtime = subprocess.run([kernels.compiler(), f"-print-file-name={library}"], capture_output=True, text=True).stdout
    if "/" not in runtime:
        pytest.skip(f"the compiler has no {library}")
    built = kernels.build(folder, ["-g", *flags], replace)
    environment = {
        "LD_PRELOAD": runtime.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",  # torch's threads are not instrumented
        "PYTHONPATH": ".",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, *arguments, str(built)]
    return subprocess.run(command, env=environment, cwd=kernels.CSRC.parent, capture_output=True, text=True)


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run = sanitized("asan", flags, ["-m", "tests.kernels"], tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("replace", [[], [("__ATOMIC_ACQUIRE", "__ATOMIC_RELAXED")]], ids=["", "planted"])
def test_thread_sanitizer_finds_only_a_planted_race(replace, tmp_path):
    code = "import sys; from tests.test_kernels import same_for_all_threads as same; assert same(sys.argv[1])"
    run = sanitized("tsan", ["-fsanitize=thread"], ["-c", code], tmp_path, replace)
    assert ("data race" in run.stderr) == (run.returncode != 0) == bool(replace), run.stdout + run.stderr


@pytest.mark.rotating(4)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, tmp_path):
    planted = kernels.Kernels(kernels.build(tmp_path, replace=[LARGE, BUGS[bug]]))
    assert any(kernels.deviations(planted)), f"the kernels pass with a planted bug: {bug}"
