"""The CUDA kernels without a GPU: their source runs on the CPU, and nvcc compiles it for every target."""

import collections
import functools
import os
import re
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch

import setup
import tclr_kernels as tk
from tclr_kernels import backends, reduced

from . import cuda, kernels, test_reduced
from .oracle import LOSSES

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

BUGS = {
    "own row counted": ("if (j < columns && first + j != i) sum", "if (j < columns) sum"),
    "own row counted, a group a tile": ("if (j != i) add_exponential", "add_exponential"),
    "own blocks in cross": ("bool exists = p.exists(a, c);", "bool exists = true;"),
    "the next set's columns": ("t.product(row, c * N + j)", "t.product(row, (c + 1) % V * N + j)"),
    "ragged columns counted": ("if (j < columns && first + j != i) sum", "if (first + j != i) sum"),
    "half of the columns forgotten": ("(largest - offset)), per_row)", "(largest - offset)), per_row / 2)"),
    "missing maximum": ("sum *= exponential(largest - offset), largest = top", "largest = top"),
    "missing maximum, a group a tile": ("sum = sum * exponential(largest - s) + 1", "sum += 1"),
    "a quarter of the features forgotten": ("k < quarters; ++k) sum", "k < quarters - 1; ++k) sum"),
    "rows of another panel": ("if (!again || p.panels() > 1)", "if (!again)"),
    "wrong power of tau": ("double factor = 1 / value_of(c.p.tau);", "double factor = 1;"),
    "missing factor 2": (" + anchors.negative(back, j, product * inverse_tau)", ""),
    "swapped positive": ("anchors.positive(slot, r) + anchors.positive(back, j)", "2 * anchors.positive(slot, r)"),
    "no projection": ("normalize ? dz - z * along", "normalize ? dz"),
    "a part forgotten": ("part < p.parts; ++part) sum", "part < 1; ++part) sum"),
    "unit forgotten": ("return sum * unit;", "return sum;"),
    "the objective: no projection": ("if (o.call.normalize) dz -=", "if (false) dz -="),
    "the objective: a part forgotten": ("part < of.parts; part += warps", "part < of.parts - 1; part += warps"),
    "the objective: unit forgotten": ("sum[x] += dz.x[x] * unit", "sum[x] += dz.x[x]"),
    "the objective: tiles in units of their own": ("by != 1) dz.scale(by)", "by != 1) dz.scale(by == 0)"),
    "the objective: <z, dz> in units of their own": ("along *= by;", ""),
    "the objective: another clip's rows": ("inner * p.order.of_set", "0"),
    "the objective: some tiles' sums forgotten": ("k < p.of.splits; ++k", "false; ++k"),
    "IC: the own set's coefficient": ("log_sigmoid(pair.excess) + pair.share(x.own)", "log_sigmoid(pair.excess)"),
    "IC: the own set not counted": ("excess = (high - pos) + more;", "excess = high - pos;"),
    "LL: the mate among the negatives": ("if (c != a && c != mate) sum", "if (c != a) sum"),
    "LL: its gradient forgotten": ("if (mates) {", "if (false) {"),
    "GL: s and x in one half": ("kind == gl, o.call.tau", "false, o.call.tau"),
    "GL: the gradient of x from s": ("r.v + (r.input == 2 ? call.V : 0)", "r.v"),
    "the temperature's gradient halved": ("(2 * tau * tau)", "(4 * tau * tau)"),
    "missing barrier": (
        "wait_for_copies();\n    __syncthreads();\n    switch",
        "wait_for_copies();\n    switch",
    ),
    "copies not waited for": (
        "    wait_for_copies();\n    __syncthreads();\n    switch",
        "    __syncthreads();\n    switch",
    ),
    "missing barrier before the products are read": (
        "j + 8 * y] = sum[x][y];\n  __syncthreads();",
        "j + 8 * y] = sum[x][y];",
    ),
}
ON_TENSOR_CORES = {
    "own row counted": ("same[e / 2] = S[n][e], S[n][e] = -INFINITY", "same[e / 2] = S[n][e]"),
    "ragged columns counted": ("if (column(n, e) >= count) S", "if (false) S"),
    "missing maximum": ("sum[h] * exponential(largest[h] - offset) + more", "sum[h] + more"),
    "one quarter of the columns forgotten": (
        "work.sum[h] * exponential(work.largest[h] - offset), 4",
        "work.sum[h], 1",
    ),
    "own blocks in cross": ("exists ? c + 1 : c, -1", "c + 1, -1"),
    "columns of a product swapped": ("S[n + 1], left, right[2], right[3]", "S[n + 1], left, right[3], right[2]"),
    "features of the gradient swapped": ("sum[n + 1], left, right[2]", "sum[n + 1], left, right[0]"),
    "columns of W in their own order": ("W[k][2]), E::of(W[k][1])", "W[k][1]), E::of(W[k][2])"),
    "the first chunk only": ("ahead.part < chunks ? ahead.part : panel", "ahead.part < chunks ? 0 : panel"),
    "the gradient of another chunk": ("ahead.part : panel, stage", "ahead.part : 0, stage"),
    "missing factor 2": (" + y.g * exponential(s - y.shift)", ""),
    "swapped positive": ("p.g_pos[p.at(I.g, J.a, I.a, i)]", "p.g_pos[p.at(I.g, I.a, J.a, i)]"),
    "coefficients of the first set": ("h < 2 && J.index == 0", "h < 2 && J.index == 0 && J.a == 0"),
    "a set forgotten": ("first + (part + 1) * sets / p.parts,", "first + part * sets / p.parts + 1,"),
    "missing barrier before coefficients": (
        "shared[threadIdx.x] = column;\n    __syncthreads();",
        "shared[threadIdx.x] = column;",
    ),
    "missing barrier before rows": ("wait_for_groups();\n    __syncthreads();", "wait_for_groups();"),
    "missing barrier after rows": ("panel : 0));\n    __syncthreads();", "panel : 0));"),
    "copies not waited for": ("    wait_for_groups();\n    __syncthreads", "    __syncthreads"),
}
ON_HOPPER = {
    "parts of a row not exchanged": ("row.d / 8 % 8 ^ row.i % 8;", "row.d / 8 % 8;"),
    "own row counted": (" || (diagonal && i == j))) e[k]", ")) e[k]"),
    "ragged columns counted": ("masked && (i >= N || j >= N ||", "masked && (i >= N ||"),
    "ragged rows counted": ("masked && (i >= N || j >= N ||", "masked && (j >= N ||"),
    "positives of one side": ("to[k / 2 * 8] = back[k / 2 * 8] = tile", "to[k / 2 * 8] = tile"),
    "own blocks in cross": ("return !cross || (a < half()) != (c < half());", "return true;"),
    "the own super-block's columns forgotten": ("if (exists && a == c) total +=", "if (false) total +="),
    "a strip's sums begin with the last piece's": ("? row[0] : to[0] + row[0]", "? to[0] + row[0] : to[0] + row[0]"),
    "a column of eight lanes forgotten": ("add_halves<8>(column, octet & 2, 8)", "add_halves<8>(column, octet & 1, 8)"),
    "alpha of the other side": ("s.alpha + l.at(w.g, c, w.a)", "s.alpha + l.at(w.g, w.a, c)"),
    "alpha of the first set": ("j = 0, ++c;\n          take_alpha();", "j = 0, ++c;"),
    "swapped positive": ("(p.g_pos[there] + p.g_pos[back])", "(2 * p.g_pos[there])"),
    "the first half of a block twice": (" + h * columns * 128; }", "; }"),
    "the next chunk's columns": ("return descriptor(address, chunk_bytes);", "return descriptor(address, 16);"),
    "a part forgotten": ("parts = r.l.serves() ? r.parts : 1;", "parts = 1;"),
    "the temperature's gradient without its factor": ("? 0 : along * factor)", "? 0 : along)"),
    "low temperatures served": ("return 1 / value_of(tau) <= limit;", "return true;"),
    "a tile not released": ("if (lane == 0) arrive(free + done.slot);\n      done", "done"),
    "a panel not released": ("if (lane == 0) arrive(panel_free + panel.slot);", ""),
    "released by too few warps": ("start_barrier(own_free, computing / 32)", "start_barrier(own_free, 1)"),
    "the phase of a barrier kept": ("slot = 0, phase ^= 1;", "slot = 0;"),
    "a consumer's phase": ("Ring slot(s.slots, 0), done", "Ring slot(s.slots, 1), done"),
    "a producer's phase": ("Ring stage(s.stages, 1), mine(1, 1)", "Ring stage(s.stages, 0), mine(1, 1)"),
    "fewer bytes expected": ("expect(barrier, Tiles::stage_bytes);", "expect(barrier, block_bytes);"),
    "rows not waited for": ("wait(full + slot.slot, slot.phase);", ""),
    "room not waited for": ("wait(free + stage.slot, stage.phase);", ""),
    "products not waited for": ("multiply(next);\n          wait_for_products<1>();", "multiply(next);"),
    "weights overwritten beside their product": (
        "wait_for_products<0>();\n      if (h == 0) release();\n      pack();",
        "pack();\n      wait_for_products<0>();\n      if (h == 0) release();",
    ),
    "rows released beside their product": (
        "wait_for_products<0>();\n      if (h == 0) release();",
        "if (h == 0) release();\n      wait_for_products<0>();",
    ),
    "missing barrier before columns are joined": ("sync_first<computing>();", ""),
}

OF_RECTANGLES = {
    "the same index counted": ("valid && j == i + p.offset", "false"),
    "the columns' place among the rows": ("of_rows ? call.first : -call.first", "call.first"),
    "rows without label alike": ("key >= 0 && key == of_candidate", "key == of_candidate"),
    "rows without label alike, gradient": ("same_key = key >= 0 && key ==", "same_key = key =="),
    "a row its own positive": ("if (a == c && same_index(j)) return;", ""),
    "own blocks in cross": ("return !resident.cross ||", "return true ||"),
    "ragged columns counted": ("k < J.rows && exists", "k < tile && exists"),
    "the next tile's columns": ("Z.row({g, c, columns.begin(b)})", "Z.row({g, c, columns.begin(b) + 1})"),
    "a part forgotten": ("part < p.parts; ++part) all.merge", "part < 1; ++part) all.merge"),
    "one thread forgotten": ("k < sharing; ++k) mine.merge", "k < sharing - 1; ++k) mine.merge"),
    "missing maximum": ("sum = sum * exp(largest - offset) + x", "sum = sum + x"),
    "spread: the sum for the mean": ("all.sum / double(all.count)", "all.sum"),
    "spread: one positive more": ("T(1 / x.count[at])", "T(1 / (x.count[at] + 1))"),
    "the passing anchors forgotten": ("add(p.passing_anchors,", "if (false) add(p.passing_anchors,"),
    "the gradient of pos forgotten": ("if (same_index) sum += T(g_pos", "if (false) sum += T(g_pos"),
    "features of the first panel": ("load(J, first,", "load(J, 0,"),
    "the mean doubled": ("x.g_neg[at] : 1)", "x.g_neg[at] : 2)"),
    "pairs: the other way round": ("add_pair(negatives - double(s))", "add_pair(double(s) - negatives)"),
    "pairs: the gradient's sign": ("size > 0 ? -1 : size < 0 ? 1", "size > 0 ? 1 : size < 0 ? -1"),
}
RECTANGLES_ON_TENSOR_CORES = {
    "the same index on the diagonal alone": ("by > -tensor_tile && by < tensor_tile", "by == 0"),
    "other candidates counted": ("if (others >> (4 * n + e) & 1)", "if (false)"),
    "all candidates positive": ("sum += is ? S[n][e] : 0, count", "sum += S[n][e], count"),
    "own blocks in cross": ("(p.resident.V + 1) / 2 ? half() : 0", "(p.resident.V + 1) / 2 ? 0 : 0"),
    "the passing anchors forgotten": ("if (weighed & of_passing) sum += weight", "if (false) sum += weight"),
    "coefficients of the first set": ("if (J.a == set ||", "if (set >= 0 ||"),
    "the gradient of pos forgotten": (": 0) + of_same_index(J, sides", ": 0) + 0 * of_same_index(J, sides"),
    "a positive of the same index forgotten": ("(same_key(n, e) ? S[n][e] : 0) + of", "of"),
    "a part forgotten": (
        "first + part_begin(part + 1, tiles, p.parts), panel",
        "first + part_begin(part, tiles, p.parts) + 1, panel",
    ),
    "missing barrier before keys": ("= key;\n      __syncthreads();", "= key;"),
    "missing barrier before coefficients": ("= column;\n      __syncthreads();", "= column;"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return cuda.build(folder), folder


@pytest.fixture(scope="module")
def host(built):
    return cuda.Host(built[0])


def test_the_kernels_agree_with_the_reference(host):
    assert not list(cuda.deviations(host, kernels.DTYPES))


def test_the_tensor_core_kernels_agree_with_the_reference(host):
    assert not list(cuda.deviations_on_tensor_cores(host))


def test_the_hopper_kernels_agree_with_the_reference(host):
    assert not list(cuda.deviations_on_hopper(host))


def test_the_rectangle_kernels_agree_with_the_reference(host):
    assert not list(cuda.rectangle_deviations(host, kernels.DTYPES))


def test_the_tensor_core_rectangle_kernels_agree_with_the_reference(host):
    assert not list(cuda.rectangle_deviations_on_tensor_cores(host))


def test_columns_without_a_row_of_their_index_read_no_upstream_gradient(host):
    """Of 300 columns, 20 are rows. The upstream gradient of the other set's sixth row must not reach column 25."""
    sets = [torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(v)).bfloat16() for v in range(2)]
    arguments = [z[:, :20] for z in sets], sets, 0.1, True, False, 0, None, None
    neg, *_ = host.rectangle(*arguments, False, False)
    g_pos = torch.zeros_like(neg)
    g_pos[0, 1, 0, 5] = torch.inf
    _, (first, second), _ = host.rectangle_backward(
        *arguments, [neg, torch.zeros_like(neg), g_pos], [], True, True, False
    )
    finite = first.isfinite().all(-1)
    assert second.isfinite().all() and not finite[0, 5] and finite.sum() == 299


def test_confident_pairs_of_short_rows_have_a_gradient(host, monkeypatch):
    """Their weights are below float32's range, but the rows are so short that their gradients are not."""
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    gradients = []
    for name in "host", "reference":
        rows = (x * 1e-30).to(torch.float32 if name == "host" else torch.float64).requires_grad_()
        negatives = torch.full((6,), -150.0, dtype=torch.float64)
        sums = tk.pair_sum(negatives, rows, row_keys=torch.arange(6) // 3, backend=name)
        gradients.append(torch.autograd.grad(sums.double() @ torch.ones(6, dtype=torch.float64) * 1e30, rows)[0])
    found, wanted = gradients
    assert wanted.abs().min() > 1e-30
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def results(inputs, function):
    leaves = [z.detach().requires_grad_() for z in inputs]
    total = function(*leaves)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


FUNCTIONS = {
    "tclr": lambda *z: tk.tclr(*z, form="release", backend="host").total,
    "nt_xent": functools.partial(tk.nt_xent, backend="host"),
}


@pytest.mark.parametrize(
    "loss, dtype, sizes, hopper",
    [
        ("tclr", torch.float64, (33, 3, 20), 0),
        ("tclr", torch.float16, (33, 3, 20), 0),
        ("nt_xent", torch.float16, (70, 2, 72), 0),
        ("nt_xent", torch.float32, (70, 2, 72), 0),
        ("nt_xent", torch.float16, (200, 2, 72), 2),
        ("nt_xent", torch.float16, (140, 2, 200), 4),
    ],
)
def test_the_order_of_threads_and_blocks_changes_no_bit(loss, dtype, sizes, hopper, host, monkeypatch):
    """Threads run in both orders between barriers: a difference would be a race. hopper: as for `Host.be_hopper`."""
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    monkeypatch.setattr(cuda.native, "tf32_allowed", lambda: True)
    inputs = LOSSES[loss].inputs(sizes, dtype)
    host.executor.be_hopper(hopper)
    upwards = results(inputs, FUNCTIONS[loss])
    host.executor.run_downwards(True)
    downwards = results(inputs, FUNCTIONS[loss])
    host.executor.run_downwards(False)
    host.executor.be_hopper(0)
    assert all(map(torch.equal, upwards, downwards))


@pytest.mark.parametrize("on_tensor_cores, dtype", [(False, torch.float32), (True, torch.float16)])
def test_the_order_of_threads_changes_no_bit_of_rectangles(on_tensor_cores, dtype, host, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    cases = cuda.RECTANGLES_ON_TENSOR_CORES if on_tensor_cores else cuda.RECTANGLES
    for case in cases.values():
        inputs = cuda.rectangle_inputs(case, dtype, normalize=False)
        found = []
        for downwards in False, True:
            host.executor.run_downwards(downwards)
            found.append(cuda.rectangle_results("host", case, inputs, False, 0.5))
        host.executor.run_downwards(False)
        assert all(map(torch.equal, *found))


def test_the_objective_takes_as_many_launches_as_its_source_states(host, monkeypatch):
    named = int(re.search(r"objective_launches = (\d+);", (kernels.CSRC / "cuda/objective.cuh").read_text())[1])
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    before = host.executor.launches()
    results(LOSSES["tclr"].inputs((40, 4, 128)), FUNCTIONS["tclr"])
    assert host.executor.launches() - before == named <= 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", test_reduced.LOSSES)
def test_a_loss_in_one_call_has_the_bits_and_launches_of_the_separate_calls(name, dtype, host, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    leaves = test_reduced.inputs((40, 9) if name == "instance_contrastive" else (3, 5, 9), dtype)
    made, launches = [], []
    for composed in False, True:
        if composed:
            monkeypatch.setattr(reduced, "must_be_composed", lambda inputs: True)
        before = host.executor.launches()
        for tau, upstream, reduction in product((0.1, torch.tensor([0.1], dtype=dtype)), (1.0, 0.3), ("mean", "sum")):
            settings = dict(reduction=reduction, backend="host")
            made.append(test_reduced.results(test_reduced.LOSSES[name], leaves, tau, upstream, **settings))
        launches.append(host.executor.launches() - before)
    half = len(made) // 2
    assert all(map(test_reduced.same, made[:half], made[half:])) and launches[0] == launches[1]


def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    runtimes = [
        subprocess.run([kernels.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if "/" not in runtimes[0]:
        pytest.skip("the compiler has no libasan.so")
    library = cuda.build(tmp_path, ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    run = subprocess.run(
        [sys.executable, "-m", "tests.cuda", str(library)],
        env={
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": ".",
            "PATH": "/usr/bin:/bin",
        },
        cwd=kernels.CSRC.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.rotating(4)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O0"], [BUGS[bug]], built=built[1]))
    assert any(cuda.deviations(planted, [torch.float32])), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.rotating(4)
@pytest.mark.parametrize("bug", ON_TENSOR_CORES)
def test_planted_bug_on_tensor_cores_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O0"], [ON_TENSOR_CORES[bug]], built=built[1]))
    assert any(cuda.deviations_on_tensor_cores(planted)), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.rotating(6)
@pytest.mark.parametrize("bug", ON_HOPPER)
def test_planted_bug_on_hopper_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O1"], [ON_HOPPER[bug]], built=built[1]))
    assert any(cuda.deviations_on_hopper(planted)), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.rotating(6)
@pytest.mark.parametrize("bug", OF_RECTANGLES)
def test_planted_bug_in_rectangles_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O0"], [OF_RECTANGLES[bug]], built[1]))
    assert any(cuda.rectangle_deviations(planted, [torch.float32])), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.rotating(6)
@pytest.mark.parametrize("bug", RECTANGLES_ON_TENSOR_CORES)
def test_planted_bug_in_rectangles_on_tensor_cores_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O0"], [RECTANGLES_ON_TENSOR_CORES[bug]], built[1]))
    found = any(cuda.rectangle_deviations_on_tensor_cores(planted))
    assert found, f"the kernels pass with a planted bug: {bug}"


@pytest.mark.parametrize(
    "named, compiled, left_out",
    [("8.0 9.0a 10.0+PTX", ["8.0", "9.0a"], "10.0+PTX"), ("8.0;9.0", ["8.0", "9.0"], None), ("10.0,12.0", None, None)],
)
def test_targets_unknown_to_an_older_nvcc_are_left_out(named, compiled, left_out, tmp_path, monkeypatch, capsys):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-arch ] && printf 'compute_%s\\n' 50 80 86 90\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup, "TARGETS", named)
    if compiled is None:
        with pytest.raises(OSError, match="compiles for none of 10.0,12.0"):
            setup.supported_targets()
        return
    assert setup.supported_targets() == compiled
    assert capsys.readouterr().err == (f"warning: {nvcc} cannot compile for {left_out}: left out\n" if left_out else "")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_target_compiles_without_a_warning_or_a_new_spill(tmp_path, capsys):
    """The binding is built as well, and must load into the installed PyTorch and register its operators for CUDA."""
    pytest.importorskip("triton")
    from benchmarks import compile_cuda

    environment = {**os.environ, "TCLR_KERNELS_CUDA": "1", "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xptxas -v"}
    call = "import setup, sys; from pathlib import Path; setup.cuda(Path(sys.argv[1]), Path(sys.argv[1]))"
    command = [sys.executable, "-c", call, str(tmp_path)]
    built = subprocess.run(command, env=environment, cwd=kernels.CSRC.parent, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert not compile_cuda.serialized(built.stderr)
    _, *entries = re.split(r"Compiling entry function '(\S+)' for '(\w+)'", built.stderr)
    names = compile_cuda.demangled(entries[::3])
    facts = collections.defaultdict(list)
    for name, target, text in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
        registers, *spilled = (
            int(re.search(f, text)[1]) for f in (r"Used (\d+)", r"(\d+) bytes spill s", r"s, (\d+) bytes spill l")
        )
        beyond = max(0, sum(spilled) - compile_cuda.SPILLS.get(names[name], 0))
        facts[target].append((registers, beyond))
    with capsys.disabled():
        for target, found in facts.items():
            registers, spilled = zip(*found, strict=True)
            print(f"\n{target}: {len(found)} kernels, {max(registers)} registers at most, spills {sum(spilled)}")
            assert len(found) > 20 and not any(spilled)
    assert set(facts) == {"sm_80", "sm_90a", "sm_100"}
    check = (
        "import sys, torch, tclr_kernels; torch.ops.load_library(sys.argv[1]);"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = 'gram_forward', 'gram_backward', 'rectangle', 'pairs', 'rectangle_backward', 'objective';"
        "sys.exit(not all(has(f'tclr_kernels::{name}', 'CUDA') for name in names))"
    )
    command = [sys.executable, "-c", check, str(tmp_path / "_cuda.so")]
    assert subprocess.run(command, cwd=kernels.CSRC.parent).returncode == 0
