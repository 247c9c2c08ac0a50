"""Every command of `tclr` from end to end on a small data set in UCF101's layout."""

import dataclasses
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for needed in "av", "jsonargparse", "safetensors", "tensorboard":
    pytest.importorskip(needed, reason=f"the trainer needs {needed}: pip install .[train]")

from tclr import (  # noqa: E402
    ablation,
    claims,
    cli,
    config,
    evaluate,
    features,
    finetune,
    labels,
    linear,
    models,
    motions,
    options,
    sets,
)  # fmt: skip
from tclr.videos import Loaded  # noqa: E402

from .test_trainer_models import release_weights  # noqa: E402

CONFIGS = Path(cli.__file__).parent / "configs"
EVALUATION = [f"--evaluation.{what}" for what in ("clips=2", "frames=8", "stride=3", "side=32")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "ucf101"
    motions.write_dataset(root, groups=3, test_groups=1, takes=1, frames=34, side=40, seed=0)
    bad = next((root / "UCF-101" / "ZoomIn").iterdir())
    bad.write_bytes(b"<html>Not found</html>")
    return root


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    pretrain(dataset, out, "--recipe.steps", "3")
    return out


def pretrain(dataset, out, *more):
    given = ["--out", str(out), "--data.root", str(dataset), "--recipe.batch", "8", "--net.width", "2"]
    cli.main(["pretrain", "--config", str(CONFIGS / "demo.yaml"), *given, *more])


def evaluated(command, run, *more):
    cli.main([command, "--run", str(run), *EVALUATION, *more])
    return json.loads((run / f"{command}.json").read_text())


def test_a_pretraining_writes_metrics_settings_and_a_checkpoint(run):
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [0, 1, 2]
    assert "width: 2" in (run / "config.yaml").read_text() and any((run / "tensorboard").iterdir())
    assert (run / "last.pt").exists() and not list(run.glob("*.part"))


def test_a_folder_in_use_is_refused_and_can_be_resumed(dataset, run, tmp_path):
    with pytest.raises(SystemExit, match="--resume"):
        pretrain(dataset, run)
    whole = tmp_path / "whole"
    pretrain(dataset, whole, "--recipe.steps", "2")
    pretrain(dataset, whole, "--recipe.steps", "3", "--resume", "true", "--recipe.schedule", "plateau")
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").open()] == [0, 1, 2]


def test_unknown_keys_are_refused(dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain(dataset, tmp_path / "x", "--recipe.learning_rate", "1")
    assert ended.value.code != 0 and "learning_rate" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("recipe: {learning_rate: 1}\n")
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "x")])
    assert "learning_rate" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_evaluations_agree_share_a_cache_and_appear_in_the_report(run):
    before = features.weights_hash(features.embedder_of(run))
    recall = evaluated("retrieval", run)
    assert 0 <= recall["r1"] <= recall["r5"] <= recall["r10"] <= recall["r20"] <= 1
    cached = {path: path.stat().st_mtime_ns for path in (run / "features").iterdir()}
    accuracy = evaluated("linear", run)["accuracy"]
    curve = evaluated("multiclip", run)["by_clips"]
    assert curve["2"] == dict(r1=recall["r1"], linear=accuracy) and list(curve) == ["1", "2"]
    counts = torch.tensor(evaluated("confusion", run)["counts"])
    assert counts.sum() == 10 and counts.diagonal().sum() / 10 == pytest.approx(accuracy)
    assert {path: path.stat().st_mtime_ns for path in (run / "features").iterdir()} == cached and len(cached) == 2
    assert features.weights_hash(features.embedder_of(run)) == before
    for picture in "gallery", "multiclip", "confusion":
        assert (run / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    cli.main(["report", "--run", str(run)])
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "http" not in page
    for wanted in (
        "R@1",
        f"{100 * recall['r1']:.1f} %",
        f"{100 * accuracy:.1f} %",
        "Environment",
        "threads",
        "Training",
    ):
        assert wanted in page


def test_real_footage_is_trained_on_and_evaluated(tmp_path, capsys):
    """The videos are parts of four films in the folder TCLR_REAL_VIDEOS, in Diving48's layout."""
    folder = os.environ.get("TCLR_REAL_VIDEOS")
    if not folder:
        pytest.skip("TCLR_REAL_VIDEOS names no folder of real videos")
    shutil.copytree(folder, tmp_path / "rgb")
    films = dict(bigbuckbunny=(0, 132), bikes=(1, 250), carphone_pristine=(2, 120), carphone_distorted=(2, 120))
    length, parts = 34, dict(train=[], test=[])
    for name, (label, frames) in films.items():
        for i, start in enumerate(range(0, frames - length + 1, length)):
            stretch = dict(vid_name=name, label=label, start_frame=start, end_frame=start + length)
            parts["test" if i % 3 == 2 else "train"].append(stretch)
    for part, stretches in parts.items():
        (tmp_path / f"Diving48_V2_{part}.json").write_text(json.dumps(stretches))
    out = tmp_path / "run"
    size = ["--data.dataset=diving48", "--data.size=[48,64]", "--recipe.augment=release", "--recipe.readers=2"]
    pretrain(tmp_path, out, *size, "--recipe.steps", "20")
    assert "unreadable" not in capsys.readouterr().out
    figures = evaluated("retrieval", out)
    print(f"{len(parts['test'])} queries, {len(parts['train'])} in the gallery: {figures}")
    assert figures["r1"] <= figures["r5"] <= figures["r20"] == 1  # so few videos only show that real files are read


def test_finetuning_measures_its_accuracy_and_export_writes_the_backbone(run, tmp_path):
    tuned = evaluated("finetune", run, "--epochs", "2")
    assert 0 <= tuned["accuracy"] <= 1 and len(tuned["losses"]) == 2
    cli.main(["export", "--run", str(run), "--file", str(tmp_path / "b.safetensors")])
    from safetensors.torch import load_file

    wanted = features.embedder_of(run).backbone.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(tmp_path / "b.safetensors").items())
    with pytest.raises(FileNotFoundError, match="folder does not exist.*nowhere/b.pt'"):
        cli.main(["export", "--run", str(run), "--file", str(tmp_path / "nowhere/b.pt")])


def test_the_summary_of_a_pretraining_says_where_unreadable_videos_are_listed(dataset, tmp_path, capsys):
    pretrain(dataset, tmp_path / "run", "--recipe.steps", "5")
    assert "1 unreadable" in (said := capsys.readouterr().out) and "; bad_videos.csv lists the unreadable ones" in said


def test_a_checkpoint_of_the_release_is_loaded_and_evaluated(run, dataset, tmp_path):
    """It has the release's names after `module.`, and its blue-green-red order is applied to the inputs."""
    net = config.Net("r3d18", width=4)
    given = config.build(net, seed=1)
    torch.save(dict(state_dict=release_weights(given)), tmp_path / "theirs.pth")
    out, data = tmp_path / "run", ["--data.root", str(dataset), "--net.backbone", "r3d18", "--net.width", "4"]
    cli.main(["load", "--out", str(out), "--file", str(tmp_path / "theirs.pth"), "--format", "release", *data])
    found = features.embedder_of(out)
    given.backbone.inputs.channels.copy_(torch.tensor([2, 1, 0]))
    assert features.weights_hash(found) == features.weights_hash(given)
    assert 0 <= evaluated("retrieval", out)["r1"] <= 1
    with pytest.raises(SystemExit, match="weights alone"):
        pretrain(dataset, out, "--resume", "true")


def test_data_check_lists_problems_and_fails_for_a_missing_video(dataset, tmp_path, capsys):
    out = tmp_path / "check.csv"
    cli.main(["data", "check", "--dataset", "ucf101", "--root", str(dataset), "--part", "test", "--out", str(out)])
    assert "10 videos" in capsys.readouterr().out
    problems = {line.split(",")[1] for line in out.read_text().splitlines()[1:]}
    assert problems <= {"short", "unreadable"} and "short" in problems
    listed = (dataset / "ucfTrainTestlist/trainlist01.txt").read_text().split()[0]
    (path,) = dataset.rglob(Path(listed).name)
    path.rename(dataset / "away")
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["data", "check", "--dataset", "ucf101", "--root", str(dataset), "--out", str(out)])
    finally:
        (dataset / "away").rename(path)
    assert ended.value.code == 1 and "1 missing" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_parse(path, capsys):
    command = "finetune" if "finetune" in path.stem else "pretrain"
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--config", str(path), "--print_config"])
    assert ended.value.code == 0 and "data:" in capsys.readouterr().out


def test_subsets_are_balanced_seeded_and_nested():
    labels = torch.arange(5).repeat(20)
    small, large = (finetune.subset(labels, share, 0) for share in (0.1, 0.5))
    assert labels[small].bincount().tolist() == [2] * 5 and set(small) < set(large)
    assert small == finetune.subset(labels, 0.1, 0) != finetune.subset(labels, 0.1, 1)


def test_finetuning_ends_at_a_loss_that_is_not_finite_and_names_the_videos():
    videos = Loaded([f"v{i}" for i in range(4)], torch.zeros(4, 4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    model = finetune.Classifier(models.BACKBONES["tiny"](), 2)
    torch.nn.init.constant_(model.fc.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="epoch 0: the loss is nan; its batch: v"):
        finetune.finetune(model, videos, range(4), SimpleNamespace(frames=4, stride=1, side=8), batch=4)


def test_the_linear_layer_separates_features_of_very_different_scales():
    """Three classes differ in two features, one of which is a million times larger."""
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(40)
    centres = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    points = (centres[labels] + 0.05 * torch.randn(120, 2)) * torch.tensor([1e3, 1e-3])
    layer = linear.fit(points[:, None], labels, 3)
    assert linear.accuracy(layer, points[:, None], labels, 1) == 1.0


SMALL = ["groups=2", "test_groups=1", "takes=1", "steps=2", "batch=4", "width=2", "eval_clips=2"]


def test_ablation_jobs_run_singly_and_are_measured_once(tmp_path, capsys, monkeypatch):
    """The tables contain the jobs that are finished."""
    monkeypatch.setitem(labels.SETTINGS, "epochs", 1)
    given = ["ablation", "--out", str(tmp_path), "--seeds=1", "--other_seeds=0", "--label_seeds=1"]
    given += [f"--scale.{each}" for each in SMALL]
    cli.main([*given, "--plan=true"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[1] == "1: IC (independent), seed 0, 2 steps" and len(listed) == 6 and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="job: found 6, wanted 0..5"):
        cli.main([*given, "--job=6"])
    cli.main([*given, "--job=0"])
    assert "No seed has both rows." in (tmp_path / "ablation.md").read_text()
    cli.main(given)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(files) == 6 + 4 + 3 and not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.lock"))
    cli.main(given)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == files
    scale = ablation.Ablation(**{key: int(value) for key, value in (each.split("=") for each in SMALL)})
    row = json.loads(ablation.figures_file(tmp_path, ablation.Job(claims.TCLR, 0, scale)).read_text())
    assert row["last_step"]["step"] == 1 and list(row["by_clips"]) == ["1", "2"] and row["torch"] == torch.__version__
    assert sum(map(sum, row["confusion"])) == 8 and list(row["by_share"]) == ["0.01", "0.1", "0.2", "0.5", "1.0"]
    cli.main([*given, "--plan=true"])
    assert sum(line.endswith("(done)") for line in capsys.readouterr().out.splitlines()) == 6
    lines = {name: len((tmp_path / f"{name}.csv").read_text().splitlines()) - 1 for name in claims.LINES}
    assert list(lines.values()) == [6 * 2, 6 * 5, 3 * 4, 4 * 2, 6 * 8]
    for name in "ablation", "ablation-labels", "ablation-confusion":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_jobs_that_the_claims_need_come_first():
    listed = ablation.jobs(ablation.Ablation(), seeds=8, other_seeds=3)
    assert len(listed) == len(set(listed)) == 8 * 6 + 3 * 5 + 2 * 3 * 2
    assert {job.row for job in listed[:24]} == {claims.SCRATCH, claims.INVARIANT, claims.TCLR}
    assert {job.row for job in listed} == set(ablation.ROWS) and {job.scale.steps for job in listed[-12:]} == {75, 300}


def test_the_tables_are_the_same_when_made_again_from_the_csv_files(tmp_path):
    rows = []
    for seed in range(3):
        for row in claims.INVARIANT, claims.TCLR, claims.SCRATCH:
            facts = dict.fromkeys([*claims.FACTS, "sets_commit", "finetuned_commit"], "x") | dict(
                sets={"1": 0.25, "2": 0.5}, constancy=0.125
            )
            labelled = {str(share): share / 2 for share in claims.SHARES}
            confusion = torch.randint(9, (8, 8), generator=torch.Generator().manual_seed(seed)).tolist()
            rows.append(
                figures(row, seed, (10, 20 + seed), (10, 30)) | facts | dict(by_share=labelled, confusion=confusion)
            )
            rows[-1]["finetuned"] = labelled if seed < 2 else {}
    claims.write(rows, ablation.Ablation(steps=2), tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert (
        "| IC + LL + GL | 2 | 0.5 ± 0.0 |" in text
        and "| IC + LL + GL | 3 | 25.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in text
    )
    (tmp_path / "ablation.md").unlink()
    claims.tabulate(tmp_path, steps=2)
    assert (tmp_path / "ablation.md").read_text() == text
    assert [each["confusion"] for each in claims.read(tmp_path)] == [each["confusion"] for each in rows]


def test_videos_are_compared_clip_by_clip():
    """Each of four videos has its own background. A single one of its clips shows which of two classes it has."""
    background, event = torch.eye(8)[:4] * 3, torch.eye(8)[4:6] * 2
    videos = background[:, None].repeat(1, 4, 1)
    videos[torch.arange(4), torch.tensor([0, 1, 2, 3])] = event[[0, 1, 0, 1]]
    gallery, queries = videos[:2], videos[2:]
    assert evaluate.set_ranking(gallery, queries, 4)[:, 0].tolist() == [0, 1]
    random = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate.set_ranking(*random, 1), evaluate.ranking(*random, 1))
    shuffled = random[0][:, torch.randperm(4)]
    assert torch.equal(evaluate.set_ranking(shuffled, random[1], 4), evaluate.set_ranking(*random, 4))


def test_constancy_is_1_for_constant_features_and_small_for_changing_ones():
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(50, 1, 6, generator=generator).expand(50, 8, 6)
    moving = torch.randn(50, 8, 6, generator=generator)
    assert sets.constancy(still) == pytest.approx(1) and sets.constancy(moving) == pytest.approx(1 / 8, abs=0.03)
    assert sets.constancy(still + moving) == pytest.approx((1 + 1 / 8) / 2, abs=0.06)


def figures(row, seed, r1, linear):
    """The figures of a job with these percentages for 1, 2, ... clips per video."""
    curve = {
        str(n): dict(r1=a / 100, r5=1.0, linear=b / 100) for n, (a, b) in enumerate(zip(r1, linear, strict=True), 1)
    }
    return dict(row=row, seed=seed, steps=2, by_clips=curve)


@pytest.mark.parametrize("better, verdict", [(6, "higher"), (1, "no clear difference"), (-6, "lower")])
def test_the_statement_says_whether_a_difference_exceeds_its_interval(better, verdict):
    """The three seeds differ by better - 1, better and better + 1: the interval is better +- 4.303 / sqrt(3)."""
    rows = []
    for seed, noise in enumerate((-1, 0, 1)):
        rows.append(figures(claims.INVARIANT, seed, (20 + 9 * seed, 30), (20, 20)))
        rows.append(figures(claims.TCLR, seed, (20 + 9 * seed, 30 + better + noise), (20, 20)))
    found = claims.Found(rows, steps=2)
    value, half, count = found.difference(claims.TCLR, claims.INVARIANT, found.at("r1"))
    assert (value, count) == (pytest.approx(better), 3) and half == pytest.approx(4.303 / 3**0.5)
    first, second = claims.statement(found).splitlines()
    wanted = f"R@1: {30 + better:.1f} against 30.0, {verdict} (difference {better:+.1f} [{better - 2.484:+.1f}, "
    assert wanted in first and f", {verdict} (difference {better:+.1f} [" in second
    assert "linear accuracy: 20.0 against 20.0, no clear difference" in first


def test_rows_of_other_steps_and_unpaired_seeds_are_left_out():
    rows = [figures(claims.TCLR, seed, (10, 40), (10, 40)) for seed in range(3)]
    rows += [figures(claims.INVARIANT, seed, (10, 20), (10, 20)) for seed in range(1, 5)]
    rows.append(figures(claims.INVARIANT, 0, (99, 99), (99, 99)) | dict(steps=4))
    found = claims.Found(rows, steps=2)
    assert found.seeds(claims.TCLR, claims.INVARIANT) == [1, 2]
    assert found.difference(claims.TCLR, claims.INVARIANT, found.gain("linear"))[0] == pytest.approx(20)


def test_one_clip_cannot_identify_a_routine():
    """A clip shows at most two of three movements, so the best accuracy is one half. Two clips can show all."""
    scale = ablation.Ablation(test_groups=3)
    bounds = ablation.oracle(scale, seed=0)
    assert bounds["best"] == 0.5 and bounds[1] <= 0.5 and all(bounds[clips] == 1 for clips in range(2, 9))
    for phases in ablation._phases(scale, 0):
        cuts = [first for _, first, _ in phases] + [95]
        assert cuts[0] == 0 and [last for *_, last in phases] == cuts[1:]
    short = ablation.oracle(dataclasses.replace(scale, eval_stride=1), seed=0)
    assert 0.25 <= short[1] < 0.5 < short[2] <= short[4] <= short[8] == 1


def test_the_movements_of_a_video_are_those_of_its_routine():
    """The phases that `ablation.oracle` uses are those in which the pose moves."""
    for label, name in enumerate(motions.ROUTINES):
        track = motions.draw_routine(name, 96, motions.randomness(0, 1, 1, label))
        phases = motions.draw_phases(name, 96, motions.randomness(0, 1, 1, label))
        assert sorted(phase[0] for phase in phases) == sorted(name.split("And"))
        for movement, first, last in phases:
            moving = {axis for axis in ("x", "y", "angle", "scale") if np.ptp(track[axis][first : last + 1]) > 1e-9}
            what = dict(SlideLeft="x", SlideRight="x", SwingAcross="x", SwingUpright="y", Pulse="scale", Wobble="angle")
            assert moving == {what[movement]}
            if movement.startswith("Slide"):
                steps = motions.wrap(np.diff(track["x"][first : last + 1]), 1)
                assert (np.sign(steps) == (1 if movement == "SlideRight" else -1)).all()


def test_mirrored_routines_share_their_frames_but_for_the_order():
    """A single pose is equally likely in both routines of a pair. Only the change from frame to frame differs."""
    assert sorted(sum(motions.MIRRORED, ())) == sorted(motions.ROUTINES)
    for pair in motions.MIRRORED:
        poses = [[], []]
        for take in range(150):
            for side, name in zip(poses, pair, strict=True):
                side.append(
                    motions.draw_routine(name, 96, motions.randomness(0, take, 0, motions.ROUTINES.index(name)))
                )
        for axis in "x", "y", "angle", "scale":
            for time in 0, 48, 95:
                one, two = (np.sort(np.sin([track[axis][time] for track in side])) for side in poses)
                assert np.abs(one - two).mean() < 0.2
        steps = [np.mean([np.mean(motions.wrap(np.diff(track["x"]), 1)) for track in side]) for side in poses]
        assert steps[0] < -0.02 and steps[1] > 0.02


def test_every_change_of_movements_exists_in_both_orders():
    assert len(motions.CHANGES) == 12 and {tuple(reversed(c.split("Then"))) for c in motions.CHANGES} == {
        tuple(c.split("Then")) for c in motions.CHANGES
    }


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="wanted the folder of a pretraining"):
        config.read_run(tmp_path)


def program(monkeypatch, capsys, *arguments):
    """What the program prints to stderr, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["tclr", *map(str, arguments)])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # the program sets its own
    with pytest.raises(SystemExit) as ended:
        cli.program()
    if isinstance(ended.value.code, str):
        return ended.value.code, 1  # Python prints the text and exits with 1
    return capsys.readouterr().err.rstrip("\n"), ended.value.code


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([], "error: found no command, wanted one, such as pretrain (tclr --help"),
        (["nothing"], "error: command: found 'nothing', wanted one of 'pretrain', 'retr"),
        (["retrieval"], "error: the following arguments are required: --run (tclr --help"),
        (
            ["linear", "--run", "x", "--share", "half"],
            "error: --share: found 'half', wanted a value of type float: share",
        ),
        (
            ["pretrain", "--out", "x", "--data.rot", "y"],
            "error: unknown option: --data.rot y, did you mean --data.root?",
        ),
        (
            ["pretrain", "--out", "x", "--dryrun"],
            "error: unknown option: --dryrun, did you mean --dry-run? (tclr pretr",
        ),
        (
            ["pretrain", "--out=x", "--recipe.form=x"],
            "error: --recipe.form: found 'x', wanted one of 'paper', 'release'",
        ),
        (
            ["confusion", "--run=x", "--classes=Run"],
            "error: --classes: found 'Run', wanted a value of type list[str]: ",
        ),
        (["linear", "--run", "x", "--share", "2"], "error: share: found 2.0, wanted a number above 0 and at most 1"),
        (["finetune", "--run", "x", "--batch", "0"], "error: batch: found 0, wanted at least 1"),
        (["retrieval", "--run=x", "--timeout=0"], "error: timeout: found 0.0, wanted a number of seconds above 0"),
        (["retrieval", "--run=x", "--timeout=1e9"], "error: timeout: found 1000000000.0, wanted a number of seconds"),
        (["retrieval", "--run=x", "--evaluation.clips=0"], "error: evaluation.clips: found 0, wanted at least 1"),
        (["retrieval", "--run", "x", "--device", "gpu"], "error: device: found 'gpu', wanted auto, cpu, cuda or"),
        (["retrieval", "--run", "nowhere"], "error: run: found no nowhere/config.yaml, wanted the folder of a pretr"),
        (["pretrain", "--out", "x", "--data.root", "/nowhere"], "error: root: found '/nowhere', wanted a folder"),
        (["load", "--out", "x", "--file", "/nowhere.pt", "--format=release", "--data.root=y"], "error: /nowhere.pt:"),
        (["data", "check", "--dataset", "ucf102", "--root", "y"], "error: --dataset: found 'ucf102', wanted one of 'u"),
    ],
)
def test_errors_of_the_command_line_are_one_line(arguments, wanted, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed, status = program(monkeypatch, capsys, *arguments)
    assert status in (1, 2) and printed.startswith(wanted) and "\n" not in printed and not list(tmp_path.iterdir())


def test_an_unexpected_error_says_how_to_get_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda: {}["missing"])
    assert program(monkeypatch, capsys) == ("error: KeyError: 'missing' (TCLR_TRACEBACK=1 shows where)", 1)
    monkeypatch.setenv("TCLR_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.program()


def test_an_error_in_a_thread_is_one_line(monkeypatch, capsys):
    """TensorBoard's thread may find that the disk is full."""

    def main():
        thread = threading.Thread(target=Path("/nowhere/events").read_text)
        thread.start()
        thread.join()
        raise SystemExit(1)

    monkeypatch.setattr(cli, "main", main)
    assert program(monkeypatch, capsys) == ("error: /nowhere/events: No such file or directory", 1)


def test_every_option_has_a_help_text(capsys):
    """An option without a help text would show its type right after its name. Every text in options.py is used."""
    texts = []
    one = (
        "pretrain",
        "retrieval",
        "linear",
        "finetune",
        "classify",
        "multiclip",
        "confusion",
        "export",
        "load",
        "ablation",
        "report",
    )
    for words in *((name, "--help") for name in one), ("data", "check", "--help"), ("retrieval", "--data.help"):
        with pytest.raises(SystemExit):
            cli.main([*words])
        texts.append(" ".join(capsys.readouterr().out.split()))
        assert not re.findall(r"--\S+ (?:[A-Z_]+|\{[^}]*\}) \((?:required, )?(?:type|default)", texts[-1])
    assert all(any(f"--{name} " in text for text in texts) for name in options.HELP)
    assert all(any(f"{title}:" in text for text in texts) for title in options.GROUPS.values())
