"""The CPU kernels, compiled without PyTorch: vector widths, threads, sanitizers and planted bugs."""

import ctypes
import resource
import subprocess
import sys

import pytest
import torch

from . import kernels

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

WIDTHS = {  # as in csrc/cpu/*.cpp; the compiler's generic vectors run with any width on any machine
    "portable": [],
    "avx2": ["-DTCLR_VECTOR_BYTES=32", "-DTCLR_TILE_ROWS=6"],
    "avx512": ["-DTCLR_VECTOR_BYTES=64", "-DTCLR_TILE_ROWS=12"],
}

BUGS = {
    "dropped mask": ("      own = -INFINITY;", ""),
    "ragged columns counted": ("j < covered<T>(count); ++j) s[j] =", "j < count; ++j) s[j] ="),
    "tile off by one": ("return b % blocks * block;", "return b % blocks * (block - 1);"),
    "last row missed": (
        "for (int64_t r = 0; r < rows; r += strip) {",
        "for (int64_t r = 0; r < rows - 1; r += strip) {",
    ),
    "missing maximum": ("sum = sum * exp(double(largest) - double(m)) + s;", "sum = sum + s;"),
    "column maximum not merged": ("exp2<T>((before - offset) * T(log2e))", "splat<T>(T(1))"),
    "wrong power of tau": ("unit / in.tau", "unit / (in.tau * in.tau)"),
    "kept tile of another pair": ("(pair.right + 1) / 2 + pair.left", "(pair.right + 1) / 2"),
    "rows not kept": (
        "if (!w.in.keep) read(w, task);",
        "if (w.in.keep) clear(w.block(w.group.z, task), w.p.rows(task) * w.ldz, T(1));",
    ),
    "missing factor 2": ("load(scale + j) + row.scale", "load(scale + j)"),
    "missing factor 2, unbounded": ("both += exp2<T>", "both = exp2<T>"),
    "swapped positive": ("group.g_pos[of_rows + q] + group.g_pos[of_columns + q]", "2 * group.g_pos[of_rows + q]"),
    "positive in the sum": (
        "      own = -INFINITY;",
        "if (p.set(pair.left) == p.set(pair.right)) own = -INFINITY;",
    ),
    "no projection": ("projected = along", "projected = 0"),
    "a block not compared with itself": ("if (!p.cross) run_pair", "if (!p.cross && opened > 0) run_pair"),
    "a pair left out": ("run_pair<T, backward>(w, pair,", "if (p.cross || round) run_pair<T, backward>(w, pair,"),
    "a cross pair left out": (
        "run_pair<T, backward>(w, pair,",
        "if (!p.cross || round) run_pair<T, backward>(w, pair,",
    ),
    "gradient unit forgotten": ("unit / in.tau", "1 / in.tau"),
    "features beyond the first panel forgotten": ("+ d * NR<T>", "+ 0 * NR<T>"),
    "own negatives forgotten": ("if (!p.cross) g_own +=", "if (false) g_own +="),
    "LL: the mate among the negatives": ("c != mate) total", "true) total"),
    "LL: its scale forgotten": ("w.scale * sigmoid", "sigmoid"),
    "LL: the next clip as mate": ("a + w.V / 2", "a + 1"),
    "logarithm of one octave": ("e * ln2 +", "0 * e +"),
    "tail of a vector": ("l < n; ++l) p[l]", "l < n - 1; ++l) p[l]"),
    "half a vector": ("lanes<double> / 2>(p, v)", "lanes<double> / 2 - 1>(p, v)"),
}


RECTANGLE_BUGS = {
    "the same index among the negatives": ("if (m.own >= 0) s[m.own] = -INFINITY;", ""),
    "the anchor itself among its positives": (
        "if (m.own >= 0 && p.a == p.c && holds(m, m.own)) positives[m.own]",
        "if (false) s[0]",
    ),
    "positives among the negatives": ("j < m.end; ++j) s[j] = -INFINITY;", "j < m.begin; ++j) s[j] = -INFINITY;"),
    "first positive missed": ("j < m.end; ++j) positives[j] = s[j]", "j < m.end - 1; ++j) positives[j + 1] = s[j + 1]"),
    "positives in other units": ("T factor = w.bounded ? w.inverse_tau : T(1);", "T factor = 1;"),
    "positive of the other set not mirrored": ("if (w.in.symmetric) w.call.pos", "if (false) w.call.pos"),
    "running maximum not raised": ("total *= before, largest = top;", "largest = top;"),
    "mean not brought to the offset": ("mean[d] *= T(before)", "mean[d] *= 1"),
    "columns' positives forgotten": (
        "merge(to.pos.largest[at], to.pos.sum[at]",
        "if (false) merge(to.pos.largest[at], to.pos.sum[at]",
    ),
    "copies not merged": (
        "copy = 1; copy < half.copies; ++copy)\n    for (int64_t i",
        "copy = 1; copy < 1; ++copy)\n    for (int64_t i",
    ),
    "copies of gradients not merged": ("k < n * half.ldz; ++k) d[k] += from[k];", "k < 0; ++k) d[k] += from[k];"),
    "copies of the mean not merged": ("merge(largest, total, half", "if (false) merge(largest, total, half"),
    "last of a segment missed": ("nth < m.segment && other", "nth < m.segment - 1 && other"),
    "share of the spread forgotten": ("(e - read(half.share))", "e"),
    "the gradient of pair_sum with the wrong sign": ("return -g * sigmoid", "return g * sigmoid"),
    "the gradient of pos from one side only": ("(w.by_columns ? w.columns.g_pos[column] : 0)", "0"),
    "columns' weights of positives forgotten": ("if (w.by_columns)\n      both +=", "if (false)\n      both +="),
    "rows' weights of positives forgotten": ("if (w.by_rows)\n      both +=", "if (false)\n      both +="),
    "gradients in the sorted order": (
        "T product = write_row(to[a], w.g, i,",
        "T product = write_row(to[a], w.g, half.cut.begin(b) + r,",
    ),
    "rows read unsorted": (
        "int64_t at = half.row(b) + r, i = half.original(half.cut.begin(b) + r);\n    half.norms",
        "int64_t at = half.row(b) + r, i = half.cut.begin(b) + r;\n    half.norms",
    ),
    "rows without labels count as alike": ("key < 0 ? Match{0, 0, -1}", "key < -9 ? Match{0, 0, -1}"),
    "the same index looked for in the unsorted order": ("first + (row_order ? row_order[i] : i)", "first + i"),
    "the anchor itself counted as a positive": ("(a == c && holds(m, m.own))", "0"),
    "gradient unit forgotten in rectangles": ("w.unit / w.in.tau", "1 / w.in.tau"),
    "a block not compared with itself in rectangles": (
        "if (w.in.symmetric && !w.in.cross) meet",
        "if (w.in.symmetric && !w.in.cross && b > 0) meet",
    ),
    "its own columns twice": ("!(w.in.symmetric && p.row_block == p.column_block)", "true"),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return kernels.build(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_vector_width_agrees_with_the_reference(width, tmp_path):
    assert not list(kernels.deviations(kernels.Kernels(kernels.build(tmp_path, WIDTHS[width])), kernels.DTYPES))


LARGE = "many_rows = 4096", "many_rows = 64"  # blocks of up to 192 rows


def test_large_blocks_agree_with_the_reference(tmp_path):
    assert not list(kernels.deviations(kernels.Kernels(kernels.build(tmp_path, replace=[LARGE])), kernels.DTYPES))


@pytest.mark.parametrize("width", WIDTHS)
def test_rectangles_agree_with_the_reference(width, tmp_path):
    large, dtypes = ([LARGE], kernels.DTYPES) if width == "portable" else ([], kernels.DTYPES[:2])
    built = kernels.Kernels(kernels.build(tmp_path, WIDTHS[width], large))
    assert not list(kernels.rectangle_deviations(built, dtypes))


def results(library, threads, slow):
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(3, 401, 20, generator=generator) for _ in range(2)]
    run = kernels.Kernels(library, threads, slow)
    term, neg, pos = run.forward(sets, 0.1, True, False)
    dz, zdz = run.backward(sets, 0.1, True, False, neg, pos, torch.ones_like(term), None, None)
    return [term, neg, pos, *dz, zdz, *rectangle_results(run, generator)]


def rectangle_results(run, generator):
    """Results of few rows against many, with gradients and the mean of columns, and of labelled rows."""
    rows, columns = torch.randn(1, 60, 8, generator=generator), torch.randn(1, 1300, 8, generator=generator)
    settings = 0.1, True, False
    neg, *_, mean = run.rectangle([rows], [columns], *settings, -1, None, None, True)
    made = [neg, torch.ones_like(neg), torch.zeros_like(neg)]
    d_rows, d_columns, along = run.rectangle_backward(
        [rows], [columns], *settings, -1, None, None, made, [], True, True
    )
    keys = torch.arange(400).expand(1, -1) % 7
    labelled = [z[:, :400] for z in columns.split(4, 2)]
    outputs = run.rectangle([], labelled, *settings, 0, keys, keys, False)
    made = [outputs[0], made[1].new_ones(outputs[0].shape), outputs[1], outputs[2], *outputs[2:4], outputs[4]]
    d_sets = run.rectangle_backward([], labelled, *settings, 0, keys, keys, made, [], True, False)
    return [neg, mean, *d_rows, *d_columns, along, *outputs[:5], *d_sets[0], d_sets[2]]


def same_for_all_threads(library):
    alone = results(library, 1, -1)
    others = (results(library, threads, slow) for threads, slow in ((2, -1), (2, 0), (3, 1), (5, 2)))
    return all(torch.equal(x, y) for other in others for x, y in zip(alone, other, strict=True))


def test_neither_the_number_of_threads_nor_a_slow_thread_changes_a_bit(library):
    assert same_for_all_threads(library)


def test_a_planted_missing_wait_between_threads_is_found(tmp_path):
    assert not same_for_all_threads(
        kernels.build(tmp_path, replace=[("while (__atomic_load_n", "if (__atomic_load_n")])
    )


def times_asleep(library):
    """How often this thread sleeps while another thread waits before each of its tasks."""
    run = kernels.Kernels(library, threads=2, slow=1)
    sets = [torch.ones(1, 801, 1) for _ in range(2)]
    run.library.hesitate(ctypes.c_int64(2000))
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    run.forward(sets, 0.5, True, False)
    run.library.hesitate(ctypes.c_int64(200))
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


def test_a_thread_that_waits_long_goes_to_sleep(library, tmp_path):
    awake = kernels.build(tmp_path, replace=[("awake = 50000;", "awake = 50000000000;")])
    assert times_asleep(library) > 3 > times_asleep(awake)


def test_beside_other_processes_small_calls_take_one_thread(library):
    """If the calling thread mostly waited for a core in a parallel region, the next 8 small calls take one thread. If
    that happens again soon, the next 16 calls do."""

    def least(regions):
        n = len(regions)
        out = (ctypes.c_double * n)()
        columns = ((ctypes.c_double * n)(*column) for column in zip(*regions, strict=True))
        ctypes.CDLL(str(library)).busy_cores(ctypes.c_int64(n), *columns, out)
        return [x > 5e6 for x in out]

    fine, held_up, no_region, uneven = (0.001, 0.0002), (0.005, 0.004), (0, 0), (0.0005, 0.0004)
    assert not any(least([fine] * 9 + [uneven] * 9))
    first = least([held_up] + [no_region] * 20)
    assert sum(first) == 8 and first[7] and not first[8]
    again = least([held_up] + [no_region] * 8 + [held_up] + [no_region] * 30)
    assert sum(again) == 8 + 16 and not again[-1]
    after = least([held_up] + [no_region] * 8 + [fine] * 70 + [held_up] + [no_region] * 20)
    assert sum(after) == 8 + 8


def sanitized(name, flags, arguments, folder, replace=()):
    """Builds the kernels with a sanitizer, and runs Python with `arguments` and the path of the library."""
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
    # vectors of two numbers have no tail but a half
    flags = WIDTHS["avx512"] if bug == "tail of a vector" else []
    planted = kernels.Kernels(kernels.build(tmp_path, flags, [LARGE, BUGS[bug]]))
    assert any(kernels.deviations(planted)), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.rotating(8)
@pytest.mark.parametrize("bug", RECTANGLE_BUGS)
def test_planted_bug_in_rectangles_is_found(bug, tmp_path):
    planted = kernels.Kernels(kernels.build(tmp_path, replace=[LARGE, RECTANGLE_BUGS[bug]]))
    assert any(kernels.rectangle_deviations(planted)), f"the kernels pass with a planted bug: {bug}"
