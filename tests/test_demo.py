"""Parts of the trainer, and two small runs of the whole demo."""

import json
from pathlib import Path

import pytest
import torch

for needed in "av", "rich", "matplotlib":
    pytest.importorskip(needed, reason=f"the demo needs {needed}: pip install .[train]")

from tclr import annotations, augment, clips, decode, demo, motions, train, videos  # noqa: E402

SMALL = "--groups 3 --test-groups 1 --takes 1 --video-frames 40 --steps 3 --batch 8 --width 4 --eval-clips 3 --seed 7"
RUNS = {demo.PIXELS, demo.RANDOM, demo.IC, demo.TCLR}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with one seed, the second into the folder of an earlier one: [(folder, rows), ...]"""
    folders = [tmp_path_factory.mktemp("demo") / "out" for _ in range(2)]
    results = []
    for folder in folders:
        results.append((folder, demo.Demo(demo.arguments([*SMALL.split(), "--out", str(folder)])).run()))
    return results


def test_files_are_videos_in_ucf101_layout(runs):
    root = runs[0][0] / "dataset"
    lists = {path.stem: path.read_bytes() for path in (root / "ucfTrainTestlist").iterdir()}
    assert set(lists) == {"classInd", "trainlist01", "testlist01"}
    for content in lists.values():
        assert content.endswith(b"\r\n") and content.count(b"\n") == content.count(b"\r\n")
    classes = dict(line.split() for line in lists["classInd"].decode().splitlines())
    assert list(classes) == [str(i) for i in range(1, 11)]
    train_lines = [line.split() for line in lists["trainlist01"].decode().splitlines()]
    test_lines = lists["testlist01"].decode().splitlines()
    assert len(train_lines) == 20 and len(test_lines) == 10
    assert all(classes[number] == name.split("/")[0] for name, number in train_lines)
    for name in [name for name, _ in train_lines] + test_lines:
        folder, file = name.split("/")
        assert file.startswith(f"v_{folder}_g") and file.endswith(".avi")
        assert decode.decode(root / "UCF-101" / name).shape == (40, 3, 40, 40)


def test_a_run_writes_metrics_pictures_and_settings(runs):
    folder, rows = runs[0]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows
    assert {row["run"] for row in rows if row["kind"] == "retrieval"} == RUNS
    for row in rows:
        if row["kind"] == "retrieval":
            assert 0 <= row["r1"] <= row["r5"] <= 1 and row["clips"] in (1, 2, 3)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [0, 1, 2] * 2
    assert all((row["ll"] > 0 and row["gl"] > 0) == (row["run"] == demo.TCLR) for row in steps)
    for picture in "losses.png", "clips.png", "gallery.png":
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "run.json").read_text())
    assert facts["options"]["steps"] == 3 and facts["windows"] == {demo.IC: "independent", demo.TCLR: "same"}


def test_views_of_ic_show_different_times_and_those_of_tclr_the_same_frames(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "pretrain", lambda embedder, videos, plan, recipe, *_: seen.append((plan, recipe)))
    run = demo.Demo(demo.arguments([*SMALL.split(), "--out", str(tmp_path)]))
    run.gallery = None
    for name in demo.IC, demo.TCLR, demo.RANDOM:
        run.trained(name)
    (ic, alone), (tclr, every) = seen
    assert (ic.windows, alone.weights) == ("independent", train.IC_ONLY)
    assert (tclr.windows, every.weights) == ("same", None)


def test_the_same_seed_gives_the_same_metrics(runs):
    (first, _), (second, _) = runs
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()


def test_a_folder_with_other_files_is_refused_without_overwrite(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="--overwrite"):
        demo.claim(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    demo.claim(tmp_path, overwrite=True)
    demo.claim(tmp_path, overwrite=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("frames, stride", [(16, 4), (8, 4), (8, 2)])
def test_global_frames_lie_in_their_local_clip(frames, stride):
    plan = clips.ClipPlan(frames, stride)
    (positions,), local = plan.cut(torch.arange(plan.window)[None])
    assert positions.tolist() == list(range(0, frames * stride, stride)) and local.shape == (stride, frames)
    for j, chunk in enumerate(positions.chunk(plan.local_clips)):
        assert set(chunk.tolist()) <= set(local[j].tolist())
        assert len(chunk) == frames // stride
    assert local.flatten().tolist() == list(range(plan.window))


def test_random_windows_reach_every_start_and_even_clips_are_evenly_spaced():
    video = torch.arange(50, dtype=torch.uint8)[:, None, None, None].expand(50, 3, 2, 2)
    generator = torch.Generator().manual_seed(0)
    starts = {
        int(clips.random_windows([video], [0], clips.ClipPlan(12, 4), generator)[0, 0, 0, 0, 0]) for _ in range(40)
    }
    assert starts == {0, 1, 2}
    assert clips.even_positions(50, 3, 8, 2).tolist() == [list(range(s, s + 16, 2)) for s in (6, 18, 30)]
    assert clips.spread(1, 8).tolist() == [4] and clips.spread(8, 8).tolist() == list(range(8))


def test_augmentation_is_constant_over_a_clip_and_differs_between_views():
    still = torch.randint(256, (1, 1, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = augment.Augment(32, torch.Generator().manual_seed(1))(still.expand(6, 8, 3, 40, 40))
    assert views.shape == (6, 8, 3, 32, 32) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(views, views[:, :1].expand_as(views))
    for i in range(6):
        for j in range(i):
            assert (views[i] - views[j]).abs().mean() > 0.01


def test_views_share_frames_and_local_clips_align_with_their_time_slices():
    """Nothing is augmented, and the embedder returns the times of the frames that it gets."""

    class Clock(torch.nn.Module):
        def forward(self, clips):
            times = clips[:, :, 0, 0, 0].float()
            return times.mean(1, keepdim=True), times.unflatten(1, (4, -1)).mean(2)[:, :, None]

        head = torch.nn.Identity()

    windows = torch.stack([torch.arange(32) + 100 * b for b in range(3)])[:, :, None, None, None].expand(3, 32, 3, 2, 2)
    g, s, x = train.embed(Clock(), windows, clips.ClipPlan(8, 4), lambda clips, views: torch.cat([clips] * views))
    assert g.shape == (2, 3, 1) and s.shape == x.shape == (2, 3, 4, 1)
    assert torch.equal(g[0], g[1]) and torch.equal(s[0], s[1]) and torch.equal(x[0], x[1])
    assert torch.allclose(s, x, atol=4) and torch.equal(x[0, :, :, 0].argsort(1), torch.arange(4).expand(3, 4))


def test_unreadable_missing_and_short_videos_are_counted(tmp_path, capsys):
    motions.write_dataset(tmp_path, groups=2, test_groups=1, takes=1, frames=20, side=16, seed=0)
    names = [entry.path for entry in annotations.read("ucf101", tmp_path, "test").entries]
    (tmp_path / names[0]).write_bytes(b"not a video")
    (tmp_path / names[1]).unlink()
    found = videos.load(tmp_path, "testlist01", 32)
    assert found.counts == dict(unreadable=1, missing=1, padded=8, decoded=8) and len(found) == len(found.labels) == 8
    assert all(len(video) == 32 for video in found.frames)
    assert Path(names[0]).name in capsys.readouterr().out


def test_mirror_pad_plays_a_video_forwards_and_backwards():
    video = torch.arange(4)[:, None, None, None]
    assert videos.mirror_pad(video, 9).flatten().tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert videos.mirror_pad(video[:1], 3).flatten().tolist() == [0, 0, 0]
