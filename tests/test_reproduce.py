"""The commands of docs/reproduce.md run as dry runs: all with --full, otherwise a different one after each commit."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

for needed in "av", "jsonargparse", "matplotlib", "safetensors", "tensorboard":
    pytest.importorskip(needed, reason=f"the trainer needs {needed}: pip install .[train]")
ROOT = Path(__file__).parents[1]

from tclr import checkpoint, claims, cli, dryrun, motions  # noqa: E402

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in PAGE.splitlines() if line.startswith("    tclr ")]
PRETRAININGS = {each[each.index("--out") + 1]: each for each in COMMANDS if each[0] == "pretrain"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which all commands run. The relative paths of the page exist there."""
    path = tmp_path_factory.mktemp("reproduce")
    (path / "python").symlink_to(ROOT / "python")
    return path


def dry(*command):
    cli.main([*command, dryrun.FLAG])


@pytest.mark.rotating(len(COMMANDS))
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_runs_as_a_dry_run(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    named = command[command.index("--out" if command[0] == "pretrain" else "--run") + 1]
    run = folder / f"{named}-dry-run"
    if command[0] != "pretrain" and not run.exists():
        dry(*PRETRAININGS[named])
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()} if run.exists() else {}
    dry(*command)
    changed = {path.name for path in run.iterdir() if path.stat().st_mtime_ns != before.get(path.name)}
    if command[0] == "pretrain":
        steps = 0 if "--recipe.epochs" in command else 2
        assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
        assert steps == 0 or checkpoint.load(run / "last.pt")["done"] == steps
    elif command[0] == "report":
        assert "report.html" in changed
    else:
        name = command[0] + (f"-{command[command.index('--share') + 1]}" if "--share" in command else "")
        assert f"{name}.json" in changed and json.loads((run / f"{name}.json").read_text())
    written = {path.name for path in (folder / "runs").iterdir()}
    assert all(name.endswith("-dry-run") for name in written - {"dry-run-videos"})


def test_the_page_names_what_its_commands_need():
    """The configurations exist, and each evaluation uses the folder of a pretraining on the page."""
    assert len(COMMANDS) > 20 and {"linear", "retrieval", "finetune", "multiclip", "confusion"} < {
        c[0] for c in COMMANDS
    }
    for command in COMMANDS:
        if "--config" in command:
            assert (ROOT / command[command.index("--config") + 1]).is_file()
        assert command[0] == "pretrain" or command[command.index("--run") + 1] in PRETRAININGS


def test_the_ablations_tables_show_the_committed_rows(tmp_path):
    """ablation.md follows from the committed rows, and docs/trainer.md quotes only lines of it."""
    results = ROOT / "benchmarks" / "results"
    for name in claims.LINES:
        shutil.copy(results / f"{name}.csv", tmp_path)
    claims.tabulate(tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert (results / "ablation.md").read_text() == text
    page = (ROOT / "docs" / "trainer.md").read_text()
    quoted = page.partition("<!-- ablation:begin -->")[2].partition("<!-- ablation:end -->")[0].splitlines()
    tables = [line for line in quoted if line.startswith(("| ", "IC + LL + GL against"))]
    assert len(tables) > 20 and set(tables) <= set(text.splitlines())


def test_a_dry_run_changes_no_run_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "last.pt").write_bytes(b"days of training")
    config = str(ROOT / "python" / "tclr" / "configs" / "demo.yaml")
    dry("pretrain", "--config", config, "--data.root", "/nowhere", "--out", "mine", "--overwrite", "true")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["last.pt"]
    assert (tmp_path / "mine" / "last.pt").read_bytes() == b"days of training"
    assert checkpoint.load(tmp_path / "mine-dry-run" / "last.pt")["settings"]["net"]["width"] == 4


def test_commands_without_a_dry_run_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        dry("export", "--run", str(tmp_path), "--file", str(tmp_path / "x"))
    assert ended.value.code and "command: found 'export'" in capsys.readouterr().err


def test_an_interrupted_generation_of_videos_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(root, **_):
        (root / "half").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(motions, "write_dataset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dryrun.videos(tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(list(dryrun.videos(tmp_path).glob("UCF-101/*/*.avi"))) == 20
