"""The benchmark suite: implementations that are timed are correct, wrong ones get no time, pages show the rows."""

import importlib
import shutil
import sys

import pytest
import torch

from benchmarks import accuracy, busy, cases, oracle, parts, processes, providers, rows, run, step, table

CHEAP = [name for name, provider in providers.PROVIDERS.items() if not provider.compiled]


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("loss", cases.WARM_UP)
def test_every_provider_computes_the_same_loss(loss, name):
    case, provider = cases.WARM_UP[loss], providers.PROVIDERS[name]
    if not provider.serves(case) or (name == "floor" and shutil.which("cc") is None):
        return
    inputs = case.inputs()
    try:
        result = provider.step(case, inputs)()
    except (ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{type(error).__name__}: {error}")
    if loss not in provider.floors:
        assert oracle.holds(*oracle.errors(result, oracle.truth(case, inputs)), case.dtype)


def test_every_case_has_a_unique_name_and_is_measured_with_native():
    assert len(cases.BY_KEY) == len(cases.CASES)
    assert all("native" in providers.serving(case) for case in cases.CASES)


@pytest.mark.parametrize("case", [cases.nt_xent(300, ""), cases.clip(150, "")], ids=["nt_xent", "clip"])
def test_the_reference_of_sampled_rows_equals_that_of_all_rows(case, monkeypatch):
    inputs = case.inputs()
    whole = oracle.truth(case, inputs)
    monkeypatch.setattr(oracle, "LARGEST", 16)
    sampled = oracle.truth(case, inputs)
    assert sampled.rows is not None
    of_loss, of_grad = oracle.errors((whole.loss, whole.grads), sampled)
    assert of_loss < 1e-12 and of_grad < 1e-12


def test_a_provider_with_wrong_results_or_an_error_gets_a_row_without_a_time():
    def breaks(a, b, tau):
        raise RuntimeError("no such\nluck")

    tried = {
        "off": providers.Provider("off", "eager", dict(nt_xent=lambda a, b, tau: 1.001 * (a * b).sum())),
        "breaks": providers.Provider("breaks", "eager", dict(nt_xent=breaks)),
    }
    off, broken = run.measured(cases.WARM_UP["nt_xent"], tried, seconds=0.01, memory=False)
    assert off["status"] == "wrong" and "p50_ms" not in off
    assert broken["status"] == "error: RuntimeError: no such luck" and "p50_ms" not in broken


def test_a_new_row_replaces_the_earlier_one_of_the_same_case(tmp_path):
    path = tmp_path / "cpu-x.csv"
    row = dict(case="nt_xent", provider="native", shape="8x4 8x4", rows=16, dtype="float32", mode="forward")
    rows.add(path, [{**row, "p50_ms": "2"}])
    rows.add(path, [{**row, "p50_ms": "3"}, {**row, "provider": "dense", "p50_ms": "6"}])
    assert [(r["provider"], r["p50_ms"]) for r in rows.read(path)] == [("native", "3"), ("dense", "6")]
    assert "| PyTorch, fastest form | 6 |" in table.page([path]) and "2x" in table.page([path])


def test_a_case_whose_reference_fails_gets_rows_with_the_error(monkeypatch):
    def truth(case, inputs):
        raise MemoryError("not enough")

    monkeypatch.setattr(oracle, "truth", truth)
    tried = {name: providers.PROVIDERS[name] for name in ("dense", "written")}
    made = list(run.measured(cases.WARM_UP["nt_xent"], tried, seconds=0.01, memory=False))
    assert [row["status"] for row in made] == ["error: MemoryError: not enough"] * 2


def fails_at_first():
    """A function that fails when it is first called, and then returns an empty row."""
    calls = []

    def make(*_):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no luck")
        return {}

    return make


def test_an_error_becomes_a_row_of_the_step_and_accuracy_tables(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(step, "measure", fails_at_first())
    monkeypatch.setattr(sys, "argv", ["step", "--out", str(path)])
    assert step.main() == 1
    assert [row["status"] for row in rows.read(path)] == ["error: RuntimeError: no luck", "ok"]

    monkeypatch.setattr(accuracy, "path", lambda: path)
    monkeypatch.setattr(accuracy, "TAUS", (0.1,))
    monkeypatch.setattr(accuracy, "_errors", fails_at_first())
    accuracy.run()
    statuses = [row["status"] for row in rows.read(path)]
    assert statuses == ["error: RuntimeError: no luck"] + ["ok"] * (3 * len(accuracy.NAMES) - 1)


def test_an_error_becomes_a_row_of_the_table_of_compiled_cuda_kernels(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import compile_cuda

    path = tmp_path / "rows.csv"
    made = fails_at_first()
    monkeypatch.setattr(compile_cuda, "RESULTS", path)
    monkeypatch.setattr(compile_cuda.setup, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(
        compile_cuda, "rows", lambda target: [made() | dict(target=f"sm_{target}", kernel="k", spills=0)]
    )
    assert compile_cuda.main([]) == 1
    found = [(row["target"], row["status"]) for row in rows.read(path)]
    assert found == [("sm_80", "error: RuntimeError: no luck"), ("sm_90a", "ok"), ("sm_100", "ok")]


def test_the_committed_rows_of_hoppers_kernels_show_no_new_spill():
    pytest.importorskip("triton")
    from benchmarks import compile_cuda

    of_hopper = {row["kernel"]: row for row in rows.read(compile_cuda.RESULTS) if row["target"] == "sm_90a"}
    for name in (f"hopper::{kernel}<{chunks}>" for kernel in ("sum_blocks", "add_blocks") for chunks in range(1, 5)):
        assert int(of_hopper[name]["tensor_instructions"]) > 0
        assert int(of_hopper[name]["spills"]) <= compile_cuda.SPILLS.get(name, 0)


def test_readme_and_benchmarks_page_show_the_committed_rows():
    readme = (rows.ROOT / "README.md").read_text()
    shown = readme.partition(table.BEGIN)[2].partition(table.END)[0].strip()
    assert shown == table.markdown(rows.files())
    assert (rows.ROOT / "docs" / "benchmarks.md").read_text() == table.page(rows.files())


def test_the_inputs_of_a_case_are_leaves_with_the_same_values_every_time():
    first, again = (cases.CASES[0].inputs() for _ in range(2))
    assert all(x.is_leaf and x.requires_grad for x in first) and all(map(torch.equal, first, again))


def test_the_page_of_several_processes_shows_the_committed_rows():
    assert processes.PAGE.read_text() == processes.page()
    for name in ("exact", "sent"):
        found = rows.read(rows.RESULTS / f"processes-{name}.csv")
        assert {row["provider"].partition(", shares")[0] for row in found} == set(processes.PROVIDERS)
        assert all(row["status"] == "ok" for row in found)


def test_the_compute_benchmark_gives_a_row_for_1_2_4_and_8_ranks():
    made = list(processes.compute(N=64, seconds=0.01))
    assert [row["P"] for row in made] == [1, 2, 4, 8] and all(float(row["ratio"]) > 0 for row in made)


@pytest.mark.full
def test_speed_accuracy_and_traffic_of_several_processes_are_measured(pool):
    made = list(processes.speed(N=64, runs=2, rounds=1))
    assert [(row["processes"], row["threads_each"]) for row in made] == [(1, 1), (1, 2), (2, 1)]
    row = processes.against_one_process(pool, "tclr-kernels nt_xent")
    assert row["value"] == row["gradient"] == row["scale"] == "1" and float(row["error"]) < 1e-12
    n, D = 8, processes.D
    sent = processes.counted(pool, "tclr-kernels clip_loss, shares", n, torch.float32)
    assert sent["handed"] == 2 * n * D * 4 + 16 * 4 * n + 8 + 8 and sent["wire"] == 3 * sent["handed"]
    assert (sent["forward"], sent["backward"]) == (2, 2)


IN_SMALL = {  # programs that the contributor's page names, with arguments that make them quick
    "labels": ["--seconds", "0.01"],
    "dropins": ["--seconds", "0.01", "--case", "solo-learn simclr_loss_func"],
}


@pytest.mark.parametrize("module", IN_SMALL)
def test_a_program_writes_rows(module, monkeypatch, tmp_path):
    out = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", [module, *IN_SMALL[module], "--out", str(out)])
    importlib.import_module(f"benchmarks.{module}").main()
    assert rows.read(out) and all(row.get("status", "ok") == "ok" for row in rows.read(out))


def test_where_the_time_of_an_objective_goes_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["parts", "--seconds", "0.01", "--out", str(tmp_path / "parts.csv")])
    parts.main()
    by_one_thread = {
        row["part"]: float(row["p50_us"]) for row in rows.read(tmp_path / "parts.csv") if row["threads"] == "1"
    }
    assert by_one_thread.keys() == {*parts.parts(), "the arithmetic alone"}
    assert by_one_thread["one video, one clip"] < by_one_thread["all"] > by_one_thread["the arithmetic alone"] > 0


def test_the_slowdown_beside_busy_processes_is_measured(capsys, tmp_path):
    arguments = [
        "busy",
        "--case",
        "nt_xent:40x128",
        "--calls",
        "20",
        "--runs",
        "1",
        "--seconds",
        "0.1",
        "--processes",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "busy.csv")])
        busy.main()
    ours, dense = rows.read(tmp_path / "busy.csv")
    assert (ours["provider"], dense["provider"], dense["of_dense"], ours["calls"]) == ("native", "dense", "1.00", "20")
    assert float(ours["of_dense"]) == pytest.approx(float(ours["rise"]) / float(dense["rise"]), rel=0.1)
