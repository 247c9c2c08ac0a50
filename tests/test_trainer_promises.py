"""The trainer's promises of docs/promises-trainer.md about labels, caches, resuming, checkpoints and names."""

import argparse
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

for needed in "av", "jsonargparse", "matplotlib", "safetensors", "tensorboard":
    pytest.importorskip(needed, reason=f"the trainer needs {needed}: pip install .[train]")
np = pytest.importorskip("numpy")

from tclr import ablation, annotations, checkpoint, cli, config, features, models, motions, report, train  # noqa: E402
from tclr.clips import ClipPlan  # noqa: E402
from tclr.videos import Loaded  # noqa: E402

from .test_trainer_models import release_weights  # noqa: E402

EVALUATION = config.Evaluation(clips=2, frames=4, stride=1, side=16)
OPTIONS = [f"--evaluation.{name}={value}" for name, value in dataclasses.asdict(EVALUATION).items()]
ODD = [
    "a$b$",
    r"$\frac{",
    "under_score",
    r"back\slash",
    "byte\udcff",
    "line\nend",
    "שלום",
    "مرحبا",
    "\u202eturned",
    "",
    "x" * 500,
]


def video(path, seed=0, frames=12, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    motions.write_video(path, np.random.default_rng(seed).integers(0, 255, (frames, side, side, 3), np.uint8))
    return path


def dataset(root, train="abc", test="abc", each=3):
    """Writes a folder of different videos, <part>/<class>/<i>.avi."""
    for seed, (part, name, i) in enumerate(
        (part, name, i) for part, names in (("train", train), ("test", test)) for name in names for i in range(each)
    ):
        video(root / part / name / f"{i}.avi", seed)
    return root


def folder(root, **more):
    return config.Data(dataset="folder", root=str(root), **more)


@pytest.fixture(scope="module")
def videos_root(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("videos"))


def pretrain(root, out, *more, steps=1):
    given = ["--data.dataset=folder", f"--data.root={root}", "--net.backbone=tiny", "--net.width=2", "--net.dim=8"]
    recipe = ["--recipe.batch=4", "--recipe.side=16", f"--recipe.steps={steps}"]
    cli.main(["pretrain", f"--out={out}", "--clips.frames=4", "--clips.stride=2", *given, *recipe, *more])


@pytest.fixture
def run(videos_root, tmp_path):
    pretrain(videos_root, tmp_path / "run")
    return tmp_path / "run"


# Labels


def test_a_class_that_a_part_lacks_shifts_no_label(tmp_path):
    root = dataset(tmp_path, train="abc", test="ac", each=1)
    train, test = (annotations.read("folder", root, part) for part in ("train", "test"))
    assert train.classes == test.classes == ["a", "b", "c"]
    assert [(entry.path, entry.label) for entry in test.entries] == [("test/a/0.avi", 0), ("test/c/0.avi", 2)]


def test_a_class_unknown_to_the_training_part_is_refused_with_its_file(tmp_path):
    root = dataset(tmp_path, train="ac", test="abc", each=1)
    with pytest.raises(ValueError, match="test/b/0.avi: found the unknown class 'b', wanted one of a, c of train/"):
        annotations.read("folder", root, "test")
    assert annotations.read("folder", root, "train", train="test").classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="train: found 'tset', wanted one of"):
        annotations.read("folder", root, "test", train="tset")


def write_ucf101(root, order=("b", "a")):
    (root / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(order, 1)))
    lines = [f"{name}/{i}.avi" for name in "ab" for i in range(2)]
    labels = {name: i for i, name in enumerate(order, 1)}
    (root / "trainlist01.txt").write_text("".join(f"{line} {labels[line[0]]}\n" for line in lines if "0" in line))
    (root / "testlist01.txt").write_text("".join(f"{line}\n" for line in lines if "1" in line))
    return [root / line for line in lines]


def write_hmdb51(root):
    for name in "ab":
        (root / f"{name}_test_split1.txt").write_text("0.avi 1 \n1.avi 2 \n")
    return [root / f"{name}/{i}.avi" for name in "ab" for i in range(2)]


def write_kinetics400(root):
    head = "label,youtube_id,time_start,time_end,split\n"
    (root / "train.csv").write_text(head + "a,a0,0,1,train\nb,b0,0,1,train\n")
    (root / "test.csv").write_text(head + "a,a1,0,1,test\nb,b1,0,1,test\n")
    return [root / f"{name}{i}_000000_000001.mp4" for name in "ab" for i in range(2)]


def write_diving48(root):
    for i, part in enumerate(("train", "test")):
        items = [dict(vid_name=f"{label}-{i}", label=label, start_frame=0, end_frame=9) for label in (3, 7)]
        (root / f"Diving48_V2_{part}.json").write_text(json.dumps(items))
    return [root / f"rgb/{label}-{i}.mp4" for label in (3, 7) for i in range(2)]


def write_folder(root):
    return [root / part / name / "0.avi" for part in ("train", "test") for name in "ab"]


def test_a_class_of_which_hmdb51_trains_on_no_video_is_refused_with_its_file(tmp_path):
    for path in (*write_hmdb51(tmp_path), tmp_path / "a0/0.avi"):
        video(path, frames=2)
    (tmp_path / "a0_test_split1.txt").write_text("0.avi 0\n")
    train, test = (annotations.read("hmdb51", tmp_path, part) for part in ("train", "test"))
    assert train.classes == test.classes == ["a", "b"] and [entry.label for entry in test.entries] == [0, 1]
    (tmp_path / "a0_test_split1.txt").write_text("0.avi 2\n")
    with pytest.raises(ValueError, match="a0_test_split1.txt:1: found the class 'a0' without a video of train"):
        annotations.read("hmdb51", tmp_path, "test")
    assert annotations.read("hmdb51", tmp_path, "test", train="test").classes == ["a", "a0", "b"]


WRITERS = dict(ucf101=write_ucf101, hmdb51=write_hmdb51, kinetics400=write_kinetics400, diving48=write_diving48)
WRITERS["folder"] = write_folder


@pytest.mark.parametrize("name", annotations.READERS)
def test_every_reader_takes_the_names_of_a_trained_classifier(tmp_path, name):
    for path in WRITERS[name](tmp_path):
        video(path, frames=2)
    train, test = (annotations.read(name, tmp_path, part) for part in ("train", "test"))
    assert train.classes == test.classes
    assert [entry.label for entry in train.entries] == [entry.label for entry in test.entries]
    known = ["other", *reversed(train.classes)]
    again = annotations.read(name, tmp_path, "test", classes=known)
    names = [[listing.classes[entry.label] for entry in listing.entries] for listing in (test, again)]
    assert names[0] == names[1] and again.classes == known
    with pytest.raises(ValueError) as refused:
        annotations.read(name, tmp_path, "test", classes=["other", names[0][0]])
    assert test.entries[1].path in str(refused.value) and f"unknown class {names[0][1]!r}" in str(refused.value)


@pytest.mark.parametrize("command", ["finetune", "linear", "retrieval", "multiclip", "confusion"])
def test_an_evaluation_of_videos_without_classes_is_an_error_that_names_the_data(run, tmp_path, command):
    for i in range(2):
        video(tmp_path / f"flat/{i}.avi", i)
    data = ["--data.dataset=folder", f"--data.root={tmp_path / 'flat'}", "--data.train=all", "--data.test=all"]
    with pytest.raises(ValueError, match="data: found videos without classes in .*flat, part 'all'"):
        cli.main([command, f"--run={run}", *OPTIONS, *data])


def test_an_evaluation_changes_only_the_data_settings_that_it_names(run, tmp_path):
    """If only another folder is named, the kind of data set, split and parts stay those of the pretraining."""
    other = dataset(tmp_path / "other", each=1)
    cli.main(["retrieval", f"--run={run}", *OPTIONS, f"--data.root={other}"])
    assert (run / "retrieval.json").exists()
    found = config.data_of(run, config.OtherData(root=str(other), size=[8, 8]))
    assert found == dataclasses.replace(config.read_run(run)[1], root=str(other), size=[8, 8])
    assert found.dataset == "folder" and config.data_of(run) == config.read_run(run)[1]


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_a_classifier_keeps_its_classes_on_another_data_set(run, tmp_path, command):
    """The other data set numbers its classes differently, and has no training part."""
    cli.main([command, f"--run={run}", *OPTIONS, *(["--epochs=1", "--batch=4"] if command == "finetune" else [])])
    assert checkpoint.load(run / f"{command}.pt")["classes"] == checkpoint.load(run / "last.pt")["classes"] == [*"abc"]
    other = tmp_path / "other"
    given = [f"--run={run}", f"--classifier={command}", "--data.dataset=folder", f"--data.root={other}"]

    def classified():
        cli.main(["classify", *given])
        return json.loads((run / f"classify-{command}.json").read_text())["accuracy"]

    source, right = config.read_run(run)[1].root, {}
    for name in "ac":
        video(other / f"test/{name}/0.avi").write_bytes((Path(source) / f"train/{name}/0.avi").read_bytes())
        right[name] = classified()
        (other / f"test/{name}").rename(other / name)
    for name in "ac":
        (other / name).rename(other / f"test/{name}")
    assert classified() == sum(right.values()) / 2
    if command == "linear":
        assert right == dict(a=1, c=1), "a linear layer must fit nine videos of noise"
    video(other / "test/b2/0.avi")
    with pytest.raises(ValueError, match="test/b2/0.avi: found the unknown class 'b2', wanted one of a, b, c"):
        classified()


def test_a_linear_layer_of_other_weights_is_refused(run, videos_root):
    cli.main(["linear", f"--run={run}", *OPTIONS])
    pretrain(videos_root, run, "--resume=true", steps=2)
    with pytest.raises(SystemExit, match="fitted on other weights"):
        cli.main(["classify", f"--run={run}", "--classifier=linear"])
    with pytest.raises(SystemExit, match="classifier: found no .*nothing.pt"):
        cli.main(["classify", f"--run={run}", "--classifier=nothing"])
    with pytest.raises(SystemExit, match="classifier: found another kind"):
        cli.main(["classify", f"--run={run}", "--classifier=last"])


# Caches


class Cache:
    """Gets the features of a data set. `extracted` counts how often the cache did not have them."""

    def __init__(self, monkeypatch, run, data):
        self.run, self.data, self.extracted = run, data, 0
        self.embedder = config.build(config.Net("tiny", 2, 8), 0).eval()
        extract = features.evaluate.clip_features

        def counted(*given, **more):
            self.extracted += 1
            return extract(*given, **more)

        monkeypatch.setattr(features.evaluate, "clip_features", counted)

    def extracts(self, **more):
        """Whether the features had to be extracted, because the cache did not have them."""
        before = self.extracted
        given = dict(dict(data=self.data, part="train", evaluation=EVALUATION), **more)
        found = features.features(self.run, self.embedder, **given)
        assert len(found.clips) == len(found.labels) == len(found.videos)
        return self.extracted > before


@pytest.fixture
def cache(monkeypatch, tmp_path):
    dataset(tmp_path / "data", train="ab", test="a", each=2)
    (tmp_path / "run").mkdir()
    return Cache(monkeypatch, tmp_path / "run", folder(tmp_path / "data"))


def test_features_are_taken_from_the_cache_while_nothing_changes(cache):
    assert cache.extracts() and not cache.extracts()


def added(root):
    video(root / "train/a/new.avi", 99)


def removed(root):
    (root / "train/b/0.avi").unlink()


def rewritten(root):
    """The size stays the same, and the modification time changes."""
    path = root / "train/a/0.avi"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def longer(root):
    """The modification time stays the same, and the size changes."""
    path = root / "train/a/0.avi"
    stat = path.stat()
    video(path, 5, frames=20)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rewritten_unseen(root):
    """Size and modification time stay the same, as after `cp -p`."""
    path = root / "train/a/0.avi"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swapped(root):
    first, second = root / "train/a/0.avi", root / "train/b/0.avi"
    first.rename(root / "x")
    second.rename(first)
    (root / "x").rename(second)


def moved(root):
    (root / "train/b").rename(root / "train/0b")


@pytest.mark.parametrize("change", [added, removed, rewritten, longer, rewritten_unseen, swapped, moved])
def test_features_are_extracted_again_if_a_video_changes(cache, change):
    cache.extracts()
    change(Path(cache.data.root))
    assert cache.extracts() and not cache.extracts()


def test_features_are_extracted_again_for_other_settings_code_weights_or_decoders(cache, monkeypatch):
    cache.extracts()
    assert cache.extracts(data=dataclasses.replace(cache.data, size=[20, 20])) and cache.extracts(part="test")
    changes = dict(clips=3, frames=3, stride=2, side=12, pooled=True)
    assert changes.keys() == dataclasses.asdict(EVALUATION).keys()
    for name, value in changes.items():
        assert cache.extracts(evaluation=dataclasses.replace(EVALUATION, **{name: value})), name
    next(cache.embedder.backbone.buffers()).add_(1)
    assert cache.extracts() and not cache.extracts()
    monkeypatch.setattr(features, "code_hash", lambda *_: "another version")
    assert cache.extracts() and not cache.extracts()
    open_videos = config.open_labelled

    def by_another_decoder(*given):
        videos = open_videos(*given)
        videos.decoder = "PyAV 0"
        return videos

    monkeypatch.setattr(config, "open_labelled", by_another_decoder)
    assert cache.extracts()


def test_features_are_extracted_again_for_other_frames_of_a_film(monkeypatch, tmp_path):
    for path in write_diving48(tmp_path):
        video(path)
    (tmp_path / "run").mkdir()
    cache = Cache(monkeypatch, tmp_path / "run", config.Data(dataset="diving48", root=str(tmp_path)))
    assert cache.extracts() and not cache.extracts()
    listed = tmp_path / "Diving48_V2_train.json"
    listed.write_text(listed.read_text().replace('"start_frame": 0', '"start_frame": 2'))
    assert cache.extracts()


def test_new_labels_reuse_features_unless_an_unreadable_video_was_replaced(monkeypatch, tmp_path):
    for path in write_ucf101(tmp_path):
        video(path)
    (tmp_path / "run").mkdir()
    cache = Cache(monkeypatch, tmp_path / "run", config.Data(root=str(tmp_path)))
    cache.extracts()
    write_ucf101(tmp_path, order=("a", "b"))
    assert not cache.extracts()
    found = features.features(cache.run, cache.embedder, cache.data, "train", EVALUATION)
    assert found.labels.tolist() == [0, 1] and found.videos.classes == ["a", "b"]
    for i in range(2):
        video(tmp_path / f"a/more{i}.avi", i + 5)
    (tmp_path / "a/bad.avi").write_bytes(b"<html>")
    files = ["a/more0.avi 1", "a/bad.avi 1", "b/0.avi 2", "b/1.avi 2"]
    (tmp_path / "trainlist01.txt").write_text("\n".join(files))
    assert cache.extracts() and not cache.extracts()
    write_ucf101(tmp_path, order=("b", "a"))
    (tmp_path / "trainlist01.txt").write_text("\n".join(f"{line[:-1]}{3 - int(line[-1])}" for line in files))
    assert cache.extracts()


def test_a_damaged_cache_is_extracted_again_with_a_message(cache, capsys):
    cache.extracts()
    (file,) = (cache.run / "features").iterdir()
    for content in b"", b"\0" * 40, file.read_bytes()[:-8]:
        file.write_bytes(content)
        assert cache.extracts() and "no features that can be read" in capsys.readouterr().out
    assert not cache.extracts()


def test_features_of_videos_that_change_as_they_are_read_are_not_kept(cache, monkeypatch):
    extract = features.evaluate.clip_features

    def slow(*given, **more):
        rewritten(Path(cache.data.root))
        return extract(*given, **more)

    monkeypatch.setattr(features.evaluate, "clip_features", slow)
    with pytest.raises(ValueError, match="changed while they were read"):
        cache.extracts()
    assert not (cache.run / "features").exists()


def test_ablation_rows_and_videos_of_other_code_are_not_reused(tmp_path, monkeypatch):
    scale = ablation.Ablation(groups=1, test_groups=1, takes=1, video_frames=8, video_side=8)
    job = ablation.Job("IC + LL", 0, scale)
    figures = ablation.figures_file(tmp_path, job)
    ablation.data(tmp_path, scale, seed=0)
    (rendered,) = tmp_path.iterdir()
    assert ablation.figures_file(tmp_path, job) == figures
    monkeypatch.setattr(ablation, "code_hash", lambda *_: "another version")
    ablation.data(tmp_path, scale, seed=0)
    assert ablation.figures_file(tmp_path, job) != figures
    assert len(list(tmp_path.iterdir())) == 2 and rendered.exists()


def test_two_processes_may_write_the_same_file(tmp_path):
    """Two evaluations of a run at the same time may do so."""
    path = tmp_path / "x"
    child = "import sys, pathlib; sys.path.insert(0, sys.argv[1])\nfrom tclr import checkpoint\n"
    child += "with checkpoint.whole(pathlib.Path(sys.argv[2]), shared=True) as file: file.write(b'theirs')"
    with checkpoint.whole(path, shared=True) as file:
        file.write(b"our")
        python = str(Path(__file__).parents[1] / "python")
        subprocess.run([sys.executable, "-c", child, python, str(path)], check=True)
        assert path.read_bytes() == b"theirs"
        file.write(b"s")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


# Resuming

SETTINGS = dict(recipe=train.Recipe(), net=config.Net("tiny", 2, 8), clips=ClipPlan(), data=config.Data())
REFUSED = {  # key -> a value that differs from the run's
    "net.backbone": "r3d18",
    "net.width": 4,
    "net.dim": 16,
    "clips.frames": 2,
    "clips.stride": 4,
    "clips.windows": "independent",
    "clips.decay": 2.0,
    "data.dataset": "ucf101",
    "data.split": 2,
    "data.train": "test",
    "recipe.optimizer": "adam",
    "recipe.batch": 2,
    "recipe.accumulate": 2,
    "recipe.learn_temperature": "true",
    "recipe.queue": 4,
    "recipe.seed": 1,
}
IC_ALONE = "--recipe.weights={ic_global: 1.0, ll: 0.0, gl: 0.0}"
APPLIED = {
    "data.root": None,
    "data.test": "all",
    "data.size": "[20,20]",
    "recipe.steps": 3,
    "recipe.epochs": 2,
    "recipe.lr": 0.5,
    "recipe.schedule": "plateau",
    "recipe.warmup": 1,
    "recipe.weight_decay": 0.5,
    "recipe.temperature": 0.5,
    "recipe.weights": "{ic_global: 1.0, ll: 0.5, gl: 0.0}",
    "recipe.form": "release",
    "recipe.backend": "reference",
    "recipe.augment": "release",
    "recipe.side": 12,
    "recipe.amp": "bf16",
    "recipe.compile": None,
    "recipe.readers": 2,
    "recipe.checkpoint_every": 1,
}


def test_every_key_is_known_to_be_applied_or_refused():
    keys = {f"{part}.{field.name}" for part, each in SETTINGS.items() for field in dataclasses.fields(each)}
    assert keys == REFUSED.keys() | APPLIED.keys() and not REFUSED.keys() & APPLIED.keys()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_splits(root):
    """UCF101's first and second split, both of the same videos."""
    root.mkdir()
    for path in write_ucf101(root, order=("a", "b")):
        video(path)
    lines = "".join(f"{name}/{i}.avi {label}\n" for label, name in enumerate("ab", 1) for i in range(2))
    for split in 1, 2:
        (root / f"trainlist0{split}.txt").write_text(lines)
    return root


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_change_is_refused_by_name_and_nothing_is_written(videos_root, tmp_path, run, key):
    root, given = videos_root, [f"--{key}={REFUSED[key]}", "--resume=true"]
    if key == "data.split":
        root, run, given = write_splits(tmp_path / "ucf101"), tmp_path / "other", [*given, "--data.dataset=ucf101"]
        pretrain(root, run, "--data.dataset=ucf101")
    elif key == "data.dataset":
        root = write_splits(tmp_path / "ucf101")
    elif key == "clips.windows":
        given += [IC_ALONE]
    elif key == "clips.decay":
        run, independent = tmp_path / "other", ["--clips.windows=independent", IC_ALONE]
        pretrain(root, run, *independent)
        given += independent
    before = contents(run)
    with pytest.raises(ValueError, match=rf"{key}: found .*, wanted .* to resume from the checkpoint"):
        pretrain(root, run, *given, steps=2)
    assert contents(run) == before
    cli.main(["export", f"--run={run}", f"--file={tmp_path / 'b.safetensors'}"])


@pytest.mark.parametrize("key", [key for key, value in APPLIED.items() if value is not None])
def test_a_key_that_can_change_is_applied(videos_root, run, key, monkeypatch):
    steps, seen = [], []
    keep = train.Run.step

    def step(self, *given):
        seen.append(self)
        steps.append(keep(self, *given))
        return steps[-1]

    monkeypatch.setattr(train.Run, "step", step)
    steps_given = 0 if key == "recipe.epochs" else 2
    pretrain(videos_root, run, f"--{key}={APPLIED[key]}", "--resume=true", steps=steps_given)
    part, name = key.split(".")
    written = config.yaml.safe_load((run / "config.yaml").read_text())[part][name]
    kept = checkpoint.load(run / "last.pt")
    assert kept["settings"][part][name] == written != getattr(SETTINGS[part], name)
    assert steps and kept["done"] == len(steps) + 1
    group = seen[0].optimizer.param_groups[0]
    assert key != "recipe.weight_decay" or group["weight_decay"] == kept["optimizer"]["param_groups"][0][name] == 0.5
    assert key != "recipe.temperature" or seen[0].loss.temperature == 0.5


PLAN = ClipPlan(4, 2)
SMALL = dict(batch=4, side=8, steps=2)


@pytest.fixture(scope="module")
def loaded():
    frames = torch.randint(256, (10, 10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Loaded([f"v{i}" for i in range(10)], list(frames), torch.arange(10) % 2)


def trained(videos, file=None, width=2, **recipe):
    torch.manual_seed(0)
    embedder = train.Embedder(models.TinyResNet3d(width), 8)
    train.pretrain(embedder, videos, PLAN, train.Recipe(**SMALL | recipe), lambda **terms: None, file=file)
    return embedder


@pytest.mark.parametrize("changed", [dict(weight_decay=0.5), dict(lr=0.1), dict(temperature=0.5), dict(form="release")])
def test_a_resumed_step_uses_the_changed_settings(loaded, tmp_path, changed):
    trained(loaded, tmp_path / "last.pt")
    resumed = trained(loaded, tmp_path / "last.pt", steps=3, **changed)
    torch.manual_seed(0)
    wanted = train.Embedder(models.TinyResNet3d(2), 8)
    run = train.Run(wanted, loaded, PLAN, train.Recipe(**SMALL), "cpu")
    wanted.train()
    run.step(), run.step()
    after = train.Run(wanted, loaded, PLAN, train.Recipe(**SMALL | dict(steps=3) | changed), "cpu")
    after.done = 2
    after.optimizer.state = run.optimizer.state
    after.step()
    for (name, found), value in zip(resumed.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(found, value), name


def test_a_resumed_optimizer_has_the_new_weight_decay(loaded, tmp_path):
    trained(loaded, tmp_path / "last.pt")
    trained(loaded, tmp_path / "last.pt", steps=3, weight_decay=0.5)
    assert checkpoint.load(tmp_path / "last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_the_initial_value_of_a_learnt_temperature_cannot_change(loaded, tmp_path):
    trained(loaded, tmp_path / "last.pt", learn_temperature=True)
    with pytest.raises(ValueError, match=r"recipe.temperature: found 0.5, wanted 0.1"):
        trained(loaded, tmp_path / "last.pt", learn_temperature=True, temperature=0.5, steps=3)


def test_other_videos_another_network_and_fewer_steps_are_refused(loaded, tmp_path):
    file = tmp_path / "last.pt"
    trained(loaded, file)
    before = file.read_bytes()
    other = dataclasses.replace(loaded, names=[*loaded.names[1:], "v0"])
    for given, wanted in [
        (dict(videos=other), "data: found 10 videos that are not those"),
        (dict(videos=dataclasses.replace(loaded, classes=["x", "y"])), "data: found 10 videos"),
        (dict(width=4), "net: found another network"),
        (dict(steps=1), "recipe.steps: found 1, wanted at least the 2 that are done"),
    ]:
        with pytest.raises(ValueError, match=wanted):
            trained(**dict(dict(videos=loaded, file=file), **given))
    assert file.read_bytes() == before


@pytest.mark.parametrize("temperature, kept", [(0.1, True), (0.5, False)])
def test_a_plateau_forgets_the_losses_of_another_objective(loaded, tmp_path, temperature, kept):
    """The learning rate that it had reached stays."""
    given = dict(schedule="plateau", steps=20)
    trained(loaded, tmp_path / "last.pt", **given)
    state = checkpoint.load(tmp_path / "last.pt")
    state["plateau"]["factor"] = 0.1
    recipe = train.Recipe(**SMALL | given | dict(temperature=temperature))
    run = train.Run(train.Embedder(models.TinyResNet3d(2), 8), loaded, PLAN, recipe, "cpu")
    run.restore(state)
    assert (run.plateau.best == state["plateau"]["best"] < float("inf")) == kept and run.plateau.factor == 0.1


def test_compilation_may_be_turned_on_when_resuming(loaded):
    embedder = train.Embedder(models.TinyResNet3d(2), 8)
    state = train.Run(embedder, loaded, PLAN, train.Recipe(**SMALL), "cpu").state()
    run = train.Run(embedder, loaded, PLAN, train.Recipe(**SMALL, compile=True), "cpu")
    run.restore(state)
    assert run.embed is not train.embed


@pytest.mark.parametrize("before, after", [("off", "fp16"), ("fp16", "off")])
def test_the_scaler_of_another_precision_is_not_loaded(loaded, before, after):
    embedder = train.Embedder(models.TinyResNet3d(2), 8)
    run = train.Run(embedder, loaded, PLAN, train.Recipe(**SMALL, amp=before), "cpu")
    now = train.Run(embedder, loaded, PLAN, train.Recipe(**SMALL, amp=after), "cpu")
    now.restore(run.state())
    assert now.scaler.is_enabled() == (after == "fp16")


def test_a_run_resumes_after_its_videos_were_moved(videos_root, run, tmp_path):
    (tmp_path / "moved").symlink_to(videos_root)
    pretrain(tmp_path / "moved", run, "--resume=true", steps=2)
    assert checkpoint.load(run / "last.pt")["settings"]["data"]["root"] == str(tmp_path / "moved")


def test_videos_that_were_added_are_refused_on_resuming(run, tmp_path):
    root = dataset(tmp_path / "more", each=4)
    before = contents(run)
    with pytest.raises(ValueError, match="data: found 12 videos that are not those of the checkpoint"):
        pretrain(root, run, "--resume=true", steps=2)
    assert contents(run) == before


def test_an_older_checkpoint_takes_its_settings_from_config_yaml(videos_root, run):
    state = checkpoint.load(run / "last.pt")
    for name in "settings", "videos", "classes":
        del state[name]
    checkpoint.save(run / "last.pt", **state)
    with pytest.raises(ValueError, match="recipe.optimizer: found 'adam', wanted 'adamw'"):
        pretrain(videos_root, run, "--resume=true", "--recipe.optimizer=adam", steps=2)
    pretrain(videos_root, run, "--resume=true", steps=2)


def test_a_checkpoint_without_window_settings_resumes_only_with_same_windows(videos_root, run):
    state = checkpoint.load(run / "last.pt")
    for name in "windows", "decay":
        del state["settings"]["clips"][name]
    checkpoint.save(run / "last.pt", **state)
    with pytest.raises(ValueError, match="clips.windows: found 'independent', wanted 'same'"):
        pretrain(videos_root, run, "--clips.windows=independent", IC_ALONE, "--resume=true", steps=2)
    pretrain(videos_root, run, "--resume=true", steps=2)


def test_nothing_is_overwritten_before_the_new_run_can_start(run, tmp_path):
    before = contents(run)
    with pytest.raises(ValueError, match="root: found"):
        pretrain(tmp_path / "gone", run, "--overwrite=true")
    with pytest.raises(SystemExit, match="both resume and overwrite"):
        pretrain(tmp_path, run, "--overwrite=true", "--resume=true")
    assert contents(run) == before


IMPOSSIBLE = [
    "recipe.backend=another", "recipe.steps=-1", "recipe.batch=0", "recipe.accumulate=0", "recipe.lr=.nan",
    "recipe.weight_decay=-1", "recipe.warmup=-5", "recipe.side=0", "recipe.readers=-1", "recipe.checkpoint_every=0",
    "data.size=[12]", "data.size=[0, 12]", "data.size=[]",
]  # fmt: skip


@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_an_invalid_value_is_refused_by_name_and_nothing_is_written(videos_root, run, way):
    """Some values were once refused only at the first step, after config.yaml was written and last.pt deleted."""
    before = contents(run)
    for given in IMPOSSIBLE:
        with pytest.raises(ValueError, match=f"{given.partition('=')[0].removeprefix('recipe.')}: found "):
            pretrain(videos_root, run, f"--{way}=true", f"--{given}", steps=2)
        assert contents(run) == before, given


# Checkpoints of others


def backbone(seed=0):
    torch.manual_seed(seed)
    return models.r3d18(4)


def weights_of(net):
    return {name: value for name, value in net.state_dict().items() if not name.startswith("inputs.")}


class Options(dict):
    """A class of another project, of which a checkpoint may contain an object."""


class Evil:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["TCLR_TEST_EVIL"])),))


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


ARGS = argparse.Namespace(lr=0.1, out=pathlib.PosixPath("runs/x"), nested=argparse.Namespace(ks=[1, 5]))
BESIDE = dict(
    epoch=3,
    args=ARGS,
    best=np.float64(0.5),
    confusion=np.eye(2),
    options=collections.defaultdict(int, a=1),
    more=types.SimpleNamespace(a=1),
    optimizer=dict(state={0: dict(exp_avg=torch.zeros(2))}, param_groups=[dict(lr=0.1)]),
)
SHAPES = {
    "bare": lambda w: w,
    "ordered": lambda w: collections.OrderedDict(w),
    "model": lambda w: dict(model=w, **BESIDE),
    "state_dict": lambda w: dict(state_dict=w, **BESIDE),
    "model_state_dict": lambda w: dict(model_state_dict=w, loss=torch.tensor(1.0)),
    "nested": lambda w: dict(checkpoint=dict(epoch=torch.tensor(1), model=dict(state_dict=w))),
    "another name": lambda w: dict(encoder=w, **BESIDE),
    "module.": lambda w: dict(state_dict=prefixed("module.", w)),
    "module.module.": lambda w: prefixed("module.module.", w),
    "compiled": lambda w: dict(model=prefixed("module._orig_mod.", w)),
    "a layer compiled": lambda w: {name.replace("layer1.", "layer1._orig_mod."): value for name, value in w.items()},
    "beside a head": lambda w: dict(model=prefixed("model.backbone.", w) | {"model.head.weight": torch.zeros(2)}),
    "averaged": lambda w: prefixed("module.", w) | dict(n_averaged=torch.tensor(3)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_in_every_common_layout_of_a_checkpoint(tmp_path, shape, zipped):
    given, net = backbone(), backbone(1)
    torch.save(SHAPES[shape](weights_of(given)), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert models.load_torchvision(net, tmp_path / "w.pth") == []
    found = weights_of(net)
    assert all(torch.equal(found[name], value) for name, value in weights_of(given).items())


@pytest.mark.parametrize("shape", ["bare", "model", "state_dict", "module.", "compiled", "nested"])
def test_the_releases_weights_are_found_in_every_common_layout_of_a_checkpoint(tmp_path, shape):
    given = train.Embedder(backbone())
    torch.save(SHAPES[shape](release_weights(given, "")), tmp_path / "w.pth")
    net = train.Embedder(backbone(1))
    assert models.load_release(net, tmp_path / "w.pth") == []
    assert torch.equal(net.head[3].weight, given.head[3].weight)
    assert torch.equal(net.backbone.layer4[1].conv2[0].weight, given.backbone.layer4[1].conv2[0].weight)


def test_exported_weights_and_a_runs_own_checkpoint_load_again(tmp_path):
    given = train.Embedder(backbone())
    given.backbone.inputs.mean.fill_(0.3)
    from safetensors.torch import save_file

    save_file(given.backbone.state_dict(), tmp_path / "b.safetensors")
    checkpoint.save(tmp_path / "last.pt", embedder=given.state_dict(), done=3)
    for name in "b.safetensors", "last.pt":
        net = backbone(1)
        assert models.load_torchvision(net, tmp_path / name) == []
        assert features.weights_hash(net) == features.weights_hash(given.backbone)


def refused(tmp_path, write, loader=models.load_torchvision):
    """The error with which a file is refused. It is one line, and the network keeps its weights."""
    path, net = tmp_path / "theirs.pth", backbone()
    write(path)
    before = features.weights_hash(net)
    with pytest.raises(ValueError) as caught:
        loader(net if loader is models.load_torchvision else train.Embedder(net), path)
    said = str(caught.value)
    assert said.startswith(f"{path}: found ") and "\n" not in said and features.weights_hash(net) == before
    assert "weights_only" not in said and "add_safe_globals" not in said and "trust" not in said
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return said


@pytest.mark.parametrize("loader", [models.load_torchvision, models.load_release])
def test_an_object_that_could_run_code_is_refused_and_none_runs(tmp_path, loader, monkeypatch):
    monkeypatch.setenv("TCLR_TEST_EVIL", str(tmp_path / "ran"))
    nested = argparse.Namespace(model=Options())
    others = [("mkdir", Evil()), ("Options", Options(a=1)), ("Linear", torch.nn.Linear(1, 1)), ("Options", nested)]
    for (found, beside), zipped in itertools.product(others, (True, False)):
        given = dict(model=weights_of(backbone()), x=beside)
        write = partial(torch.save, given, _use_new_zipfile_serialization=zipped)
        said = refused(tmp_path, write, loader)
        assert found in said and "wanted weights alone, as torch.save(model.state_dict(), file)" in said
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch.save(weights_of(backbone()), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    pages = b"", b"<html>404 Not Found</html>", whole[: len(whole) // 2], whole[:-30], b"PK\3\4", bytes(range(256)) * 2
    for content in pages:
        assert "found no file of weights" in refused(tmp_path, lambda path, content=content: path.write_bytes(content))
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    assert "TorchScript program" in refused(tmp_path, lambda path: program.save(str(path)))
    for other in [1, 2], torch.zeros(3), {}, dict(epoch=3), dict(model=dict(a=1)), {3: torch.zeros(1)}:
        assert "no tensors by name" in refused(tmp_path, lambda path, other=other: torch.save(other, path))
    itself = {}
    itself["model"] = itself
    assert "no tensors by name" in refused(tmp_path, lambda path: torch.save(itself, path))


def test_weights_of_several_networks_are_refused(tmp_path):
    w = weights_of(backbone())
    for found in dict(student=w, teacher=w), prefixed("q.", w) | prefixed("k.", w):
        said = refused(tmp_path, lambda path, found=found: torch.save(found, path))
        assert ("student, teacher" in said or "k.stem.0.weight, q.stem.0.weight" in said) and "wanted" in said


def test_an_object_in_a_runs_own_checkpoint_is_refused_too(tmp_path):
    torch.save(dict(done=Options()), tmp_path / "last.pt")
    with pytest.raises(ValueError, match="found an object of .*Options, and loading such an object can run code"):
        checkpoint.load(tmp_path / "last.pt")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "gone.pt")


# Names


def drawn_texts(monkeypatch):
    """A list that gets (text, whether it is parsed for formulas) of all texts of pictures that are saved."""
    texts, save = [], report._save

    def kept(figure, path):
        from matplotlib.text import Text

        texts.extend((text.get_text(), text.get_parse_math()) for text in figure.findobj(Text))
        save(figure, path)

    monkeypatch.setattr(report, "_save", kept)
    return texts


def test_names_are_drawn_as_they_are_in_the_confusion_matrix(tmp_path, monkeypatch):
    texts = drawn_texts(monkeypatch)
    report.plot_confusion(torch.eye(len(ODD), dtype=torch.long), ODD, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG") and not any(math for _, math in texts)
    for name in ODD:
        wanted = {"byte\udcff": r"byte\xff", "line\nend": r"line\nend", "\u202eturned": r"\u202eturned"}.get(name, name)
        assert ("x" * 20 + "…" + "x" * 19 if name == "x" * 500 else wanted, False) in texts


def test_names_are_drawn_as_they_are_in_the_gallery(tmp_path, monkeypatch):
    texts, frames = drawn_texts(monkeypatch), [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)] * len(ODD)
    labels = torch.arange(len(ODD))
    videos = Loaded([f"v{i}.avi" for i in labels], frames, labels, classes=ODD)
    unnamed = Loaded([f"{name or 'x'}/v.avi" for name in ODD], frames, labels)
    ranks = labels.repeat(len(ODD), 1)
    for some in videos, unnamed:
        for chosen in [*range(len(ODD))], [0]:
            texts.clear()
            report.plot_gallery(some, some, ranks, chosen, tmp_path / "g.png")
            assert ("query: a$b$", False) in texts and ("under_score", False) in texts
            assert len(chosen) == 1 or (r"query: byte\xff", False) in texts


def test_a_user_s_own_settings_of_matplotlib_change_no_name(tmp_path):
    report.matplotlib.rcParams["text.usetex"] = True
    try:
        report.plot_confusion(torch.eye(2, dtype=torch.long), ["a_b", "c$"], tmp_path / "c.png")
        assert report.matplotlib.rcParams["text.usetex"]
    finally:
        report.matplotlib.rcParams["text.usetex"] = False


def test_a_picture_of_many_classes_is_drawn_at_a_lower_resolution(tmp_path, monkeypatch):
    """matplotlib draws no picture of 2^16 pixels or more: 2,000 classes at 130 dots an inch."""
    seen = []
    monkeypatch.setattr(report.plt.Figure, "savefig", lambda self, file, dpi, format: seen.append(
        dpi * max(self.get_size_inches())))  # fmt: skip
    figure = report.plt.figure(figsize=(700, 700))
    report._save(figure, tmp_path / "x.png")
    assert seen == [2**15]


def test_a_data_set_of_odd_names_is_evaluated_and_reported(tmp_path):
    names = ["$a_{b", r"\alpha$", "n\nl", os.fsdecode(b"\xff\xfe"), "שלום", "z" * 200]
    root = dataset(tmp_path / "data", train=names, test=names, each=1)
    run = tmp_path / r"run $x_\y"
    pretrain(root, run)
    for command in "retrieval", "confusion", "linear", "multiclip":
        cli.main([command, f"--run={run}", *OPTIONS])
    assert json.loads((run / "confusion.json").read_text())["classes"] == sorted(names)
    assert checkpoint.load(run / "linear.pt")["classes"] == sorted(names)
    cli.main(["report", f"--run={run}"])
    assert r"run $x_\y" in (run / "report.html").read_text()
    assert {path.name for path in run.glob("*.png")} == {"gallery.png", "confusion.png", "multiclip.png"}


@pytest.mark.parametrize(
    "command, picture", [("retrieval", "gallery"), ("multiclip", "curves"), ("confusion", "confusion")]
)
def test_results_are_kept_if_a_picture_fails(run, monkeypatch, command, picture):
    def fails(*_):
        raise OSError("no space left on the plotter")

    monkeypatch.setattr(report, f"plot_{picture}", fails)
    with pytest.raises(OSError, match="plotter"):
        cli.main([command, f"--run={run}", *OPTIONS])
    assert json.loads((run / f"{command}.json").read_text())["hash"]
    assert command not in ("retrieval",) or "retrieval" in (run / "results.csv").read_text()


def test_a_picture_that_fails_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    report.plot_confusion(torch.eye(2, dtype=torch.long), ["a", "b"], path)
    before = path.read_bytes()

    def breaks(self, file, **_):
        file.write(b"half")
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(report.plt.Figure, "savefig", breaks)
    with pytest.raises(RuntimeError, match="drawing failed"):
        report.plot_confusion(torch.eye(2, dtype=torch.long), ["a", "b"], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
