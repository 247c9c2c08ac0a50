"""Reading videos: any window equals that slice of a decoding of the whole file."""

import itertools
import json
import os
import random
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import torch

av = pytest.importorskip("av", reason="decoding needs av: pip install .[train]")
np = pytest.importorskip("numpy")

from tclr import annotations, check, config, decode, index, videos  # noqa: E402

from . import films  # noqa: E402

DECODERS = list(dict.fromkeys([decode.PYAV, decode.DECODER]))
PACKED = Path(__file__).parent / "packed_b_frames.avi"  # by `ffmpeg -c:v libxvid -bf 2`: PyAV has no XviD encoder
X264 = "scenecut=0"
WRITTEN = {  # films that PyAV writes, so that they can be tested without the ffmpeg program
    "mpeg4.avi": ("mpeg4", dict(g="10")),
    "mpeg4_b.avi": ("mpeg4", dict(g="12", bf="2")),
    "h264_b.avi": ("libx264", {"g": "10", "bf": "3", "x264-params": X264}),
    "mpeg2_b.avi": ("mpeg2video", dict(g="12", bf="2")),
    "mpeg4_long.mp4": ("mpeg4", dict(g="300")),
    "h264_b.mp4": ("libx264", {"g": "10", "bf": "3", "x264-params": X264}),
    "h264_refresh.mp4": ("libx264", {"g": "14", "x264-params": f"intra-refresh=1:{X264}"}),
    "hevc_open.mp4": ("libx265", {"x265-params": "keyint=12:min-keyint=12:open-gop=1:scenecut=0:log-level=0"}),
    "av1.mp4": ("libsvtav1", dict(preset="10", g="10", crf="18")),
    "h264_open.mkv": ("libx264", {"g": "12", "bf": "3", "x264-params": f"open-gop=1:{X264}"}),
    "hevc.mkv": ("libx265", {"x265-params": "keyint=10:open-gop=0:scenecut=0:log-level=0"}),
    "mpeg1_b.mkv": ("mpeg1video", dict(g="12", bf="2")),
    "ffv1.mkv": ("ffv1", {}),
    "mpeg4_b.mov": ("mpeg4", dict(g="12", bf="2")),
    "mjpeg.mov": ("mjpeg", dict(strict="unofficial")),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "10"}),
    "h264_b.ts": ("libx264", {"g": "10", "bf": "3", "x264-params": X264}),
    "h264_refresh.ts": ("libx264", {"g": "14", "x264-params": f"intra-refresh=1:{X264}"}),
    "hevc_open.ts": ("libx265", {"x265-params": "keyint=12:min-keyint=12:open-gop=1:scenecut=0:log-level=0"}),
    "mpeg2_b.ts": ("mpeg2video", dict(g="12", bf="2")),
    "mpeg1_b.mpg": ("mpeg1video", dict(g="12", bf="2")),
    "mpeg2_b.mpg": ("mpeg2video", dict(g="12", bf="2")),
    "mpeg2.mpg": ("mpeg2video", dict(g="10")),
    "mpeg2_b.m2v": ("mpeg2video", dict(g="12", bf="2")),
    "h264_b.h264": ("libx264", {"g": "10", "bf": "3", "x264-params": X264}),
    "h264_b.mpg": ("libx264", {"g": "10", "bf": "3", "x264-params": X264}),
}
CONTAINERS = ("mpeg4_b.avi", "h264_b.mp4", "h264_open.mkv", "mpeg4_b.mov", "vp9.webm", "h264_b.ts", "mpeg2_b.mpg")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("TCLR_INDEX", str(tmp_path / "indices"))
    index._known.cache_clear()
    index._cannot_keep.cache_clear()


def forget():
    """Forgets the indices in memory, so that only those in the cache are left, as for another process."""
    index._known.cache_clear()


def write(folder, name, frames=films.FRAMES):
    return films.write(folder / name, frames, *WRITTEN[name], side=films.SIDE)


def wrong_windows(path, expected, count, decoder):
    """How many of `count` windows do not show the expected numbers, or have positions past the end."""
    assert decode.length(path) == len(expected)
    wrong = 0
    for wanted in films.windows(path, len(expected), count):
        frames, held = decode.read(path, wanted, decoder)
        wrong += held > 0 or films.numbers(frames) != expected[wanted.start : wanted.stop]
    return wrong


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [*WRITTEN, PACKED.name])
def test_windows_are_slices_of_the_sequential_decode(tmp_path, name, decoder):
    path = PACKED if name == PACKED.name else write(tmp_path, name)
    whole = films.sequential(path)
    assert films.numbers(whole) == list(range(len(whole))), "the film does not show the numbers of its frames"
    assert wrong_windows(path, films.numbers(whole), 13, decoder) == 0
    for wanted in films.windows(path, len(whole), 3, seed=1):
        assert torch.equal(decode.read(path, wanted, decode.PYAV)[0], whole[list(wanted)]), "a window has other bits"


@pytest.mark.skipif(not films.FFMPEG, reason="no ffmpeg program to write and judge these films: apt-get install ffmpeg")
def test_a_sample_of_all_films_is_read_as_by_the_ffmpeg_program(tmp_path, rotation):
    """It reads 300 windows, of other films after each commit."""
    against_the_program(random.Random(rotation).sample(list(films.matrix()), 30), tmp_path, 10)


@pytest.mark.full
@pytest.mark.skipif(not films.FFMPEG, reason="no ffmpeg program to write and judge these films: apt-get install ffmpeg")
@pytest.mark.parametrize("container", films.CONTAINERS)
def test_every_film_is_read_as_by_the_ffmpeg_program(tmp_path, container):
    against_the_program([film for film in films.matrix() if film.container == container], tmp_path, 8)


def against_the_program(chosen, folder, count):
    wrong = {}
    for film in chosen:
        path = films.shoot(film, folder)
        turned = films.sequential(path).rot90(film.turn // 90, (2, 3))
        expected = films.numbers(films.oracle(path) if film.alike_in_all_versions else turned)
        wrong[film.name] = wrong_windows(path, expected, count, decode.DECODER)
    assert not any(wrong.values()), {name: count for name, count in wrong.items() if count}


RAW = f"-f rawvideo -pix_fmt rgb24 -s {films.SIDE}x{films.SIDE} -r 25 -i -"
H264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -g 12 -bf 3 -x264-params open-gop=1:scenecut=0"
OTHER = "-f lavfi -i testsrc=s=96x80:r=10:d=3"
ODD = {  # file -> (ffmpeg's arguments that write it, and those that copy it afterwards)
    "wrapped.ts": (f"{RAW} {H264} -output_ts_offset 95442", ""),  # the 33 bits of its timestamps overflow
    "wrapped.mpg": (f"{RAW} -c:v mpeg2video -q:v 3 -g 12 -bf 2 -output_ts_offset 95442 -f vob", ""),
    "cover.mp4": (f"{RAW} {OTHER} {H264} -map 0 -map 1 -c:v:1 png -frames:v:1 1",
                  "-map 0:1 -map 0:0 -c copy -disposition:v:0 attached_pic"),
    "two.ts": (f"{RAW} {OTHER} {H264} -map 0 -map 1", ""),
    "dropped.avi": (f"{RAW} -vf select=lt(n\\,5)+gt(n\\,30) -fps_mode vfr -c:v mpeg4 -q:v 3 -g 12", ""),
    "interlaced.ts": (f"{RAW} -c:v mpeg2video -q:v 3 -g 12 -bf 2 -flags +ildct+ilme", ""),
    "ten_bits.mp4": (f"{RAW} {H264.replace('yuv420p', 'yuv420p10le')}", ""),
    "joined.ts": (f"{RAW} {H264}", "joined"),
}  # fmt: skip


@pytest.mark.skipif(not films.FFMPEG, reason="no ffmpeg program to write and judge these films: apt-get install ffmpeg")
@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_by_the_ffmpeg_program(tmp_path, name):
    writing, copying = ODD[name]
    path = films.run(writing, tmp_path / name, films.pictures(films.FRAMES).tobytes())
    if copying == "joined":  # timestamps start again in the middle
        later = films.run(writing, tmp_path / "later.ts", films.pictures(2 * films.FRAMES)[films.FRAMES :].tobytes())
        path.write_bytes(path.read_bytes() + later.read_bytes())
    elif copying:
        path = films.run(f"-i {path} {copying}", tmp_path / f"copy_of_{name}")
    whole = films.oracle(path)
    assert torch.allclose(decode.decode(path, decode.PYAV).float(), whole.float(), rtol=0, atol=16)
    for decoder in DECODERS:
        assert wrong_windows(path, films.numbers(whole), 12, decoder) == 0


REPEATED = {"repeated.mkv": lambda pts, dts: (pts // 3000 * 3000, dts // 3000 * 3000)}
STAMPS = {  # pts and dts in thousandths of a frame
    **REPEATED,
    "late.mkv": lambda pts, dts: (pts + 90000, dts + 90000),
    "late.ts": lambda pts, dts: (pts + 90000, dts + 90000),
    "late.mp4": lambda pts, dts: (pts + 90000, dts + 90000),
    "negative.mp4": lambda pts, dts: (pts - 13000, dts - 13000),
    "negative.mov": lambda pts, dts: (pts - 13000, dts - 13000),
    "negative.mkv": lambda pts, dts: (pts - 13000, dts - 13000),
    "uneven.mp4": lambda pts, dts: (pts + pts // 7000 * 2500, dts + dts // 7000 * 2500),
    "uneven.mkv": lambda pts, dts: (pts + pts // 7000 * 2500, dts + dts // 7000 * 2500),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "name, codec", [pair for pair in itertools.product(STAMPS, ("libx264", "mpeg4")) if pair != ("late.ts", "mpeg4")]
)  # that pair is left out, since a copy of MPEG-4 from MP4 into TS lacks its header
def test_films_with_unusual_timestamps_are_read_exactly(tmp_path, name, codec, decoder):
    """They are repeated, late, uneven, or negative, which MP4 turns into an edit list that hides frames."""
    b_frames = {} if name in REPEATED else dict(bf="2")
    whole = films.write(tmp_path / "whole.mp4", 70, codec, dict(g="10", **b_frames), side=films.SIDE)
    path = films.copied(whole, tmp_path / name, STAMPS[name])
    expected = films.numbers(films.sequential(path))
    if name in ("negative.mp4", "negative.mov"):
        assert len(expected) < 70, "the film hides frames"
    assert wrong_windows(path, expected, 12, decoder) == 0


def test_hidden_frames_of_a_cut_film_are_not_counted(tmp_path):
    """Evaluation and pretraining see the same clips of a film whose first packets are hidden."""
    whole = films.write(tmp_path / "whole.mp4", 100, "libx264", dict(g="10", bf="2"), side=films.SIDE)
    path = films.copied(whole, tmp_path / "data" / "cut.mp4", lambda pts, dts: (pts - 23000, dts - 23000))
    found = videos.Files(annotations.read("folder", path.parent, "all"), shortest=16)
    with av.open(str(path)) as container:
        packets = sum(packet.size > 0 for packet in container.demux(video=0))
    assert found.length(0) == 77 == decode.length(path) < packets
    assert films.numbers(found.read(0, range(60, 77))) == list(range(83, 100)) and found.counts["held"] == 0
    assert check.problem(path.parent, found.entries[0]) is None


MATRICES = [turn for turn in itertools.product((-1, 0, 1), repeat=4) if abs(turn[0] * turn[3] - turn[1] * turn[2]) == 1
            and sum(map(abs, turn)) == 2]  # fmt: skip


def with_matrix(path, a, b, c, d):
    """The film with that matrix of display written into its header."""
    content = bytearray(path.read_bytes())
    at = content.index((0x10000).to_bytes(4, "big") + bytes(12), content.index(b"tkhd"))
    for place, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        content[at + place : at + place + 4] = round(value * 0x10000).to_bytes(4, "big", signed=True)
    turned = path.with_name(f"turned_{a}_{b}_{c}_{d}.mp4")
    turned.write_bytes(content)
    return turned


def shown(picture, a, b, c, d):
    """Moves pixel (x, y) of a picture [3, H, W] to (a x + c y, b x + d y), shifted so that all are in the frame."""
    y, x = torch.meshgrid(*map(torch.arange, picture.shape[1:]), indexing="ij")
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    result = torch.empty(3, int(to_y.max()) + 1, int(to_x.max()) + 1, dtype=picture.dtype)
    result[:, to_y, to_x] = picture
    return result


def test_encoders_leave_the_scheduling_as_it_is(tmp_path):
    before = os.sched_getscheduler(0)
    write(tmp_path, "av1.mp4")
    assert os.sched_getscheduler(0) == before


def oblong(folder, codec="mpeg4"):
    """A film of 64 x 96, light in one corner and in half of one side."""
    path = folder / "oblong.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for i in range(20):
            picture = np.full((64, 96, 3), 5 * i, np.uint8)
            picture[:16, :16], picture[:8, 48:] = 250, 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("turn", MATRICES)
def test_frames_are_turned_and_mirrored_by_the_display_matrix(tmp_path, turn):
    plain = oblong(tmp_path)
    path = with_matrix(plain, *turn)
    expected = torch.stack([shown(picture, *turn) for picture in films.sequential(plain)])
    frames, held = decode.read(path, range(5, 15))
    assert held == 0 and torch.equal(frames, expected[5:15])
    assert decode.size(path) == index.find(path).size == expected.shape[2:]
    if films.FFMPEG and turn[0] * turn[3] - turn[1] * turn[2] == 1:  # older versions of ffmpeg do not mirror
        assert (films.oracle(path)[5:15].float() - frames.float()).abs().mean() < 2


@pytest.mark.skipif(not films.FFMPEG, reason="no ffmpeg program to judge odd angles: apt-get install ffmpeg")
def test_odd_angles_are_turned_as_by_the_ffmpeg_program(tmp_path):
    sine, cosine = np.sin(np.pi / 6), np.cos(np.pi / 6)
    path = with_matrix(oblong(tmp_path), cosine, sine, -sine, cosine)
    expected = films.oracle(path)
    frames, _ = decode.read(path, range(20))
    assert frames.shape == expected.shape and (frames.float() - expected.float()).abs().mean() < 3


def growing(path, sizes=(64, 96, 48)):
    """Writes a stream whose frames change their size every 20 frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height = stream.width = sizes[0]
        stream.pix_fmt = "yuv420p"
        for part, side in enumerate(sizes):
            encoder = av.CodecContext.create("mpeg2video", "w")
            encoder.width = encoder.height = side
            encoder.pix_fmt, encoder.time_base, encoder.framerate = "yuv420p", Fraction(1, 25), 25
            encoder.options = dict(g="10")
            for i in range(20 * part, 20 * part + 20):
                frame = av.VideoFrame.from_ndarray(films.pictures(i + 1, side)[i], format="rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts = i
                container.mux(placed(encoder.encode(frame), stream))
            container.mux(placed(encoder.encode(), stream))
    return path


def placed(packets, stream):
    for packet in packets:
        packet.stream = stream
    return packets


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", ["ts", "mkv", "mpg"])
def test_frames_of_another_size_are_resized_to_the_first(tmp_path, suffix, decoder):
    path = growing(tmp_path / f"growing.{suffix}")
    with av.open(str(path)) as container:
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    expected = [films.numbers(picture.permute(2, 0, 1)[None])[0] for picture in pictures]
    assert decode.length(path) == len(expected) >= 58 and len({picture.shape for picture in pictures}) == 3
    frames, held = decode.read(path, range(15, 55), decoder)
    assert frames.shape == (40, 3, 64, 64) and held == 0 and films.numbers(frames) == expected[15:55]
    assert torch.equal(frames[:3], torch.stack(pictures[15:18]).permute(0, 3, 1, 2)), "frames of the first size changed"
    if films.FFMPEG:
        assert (films.oracle(path)[15:55].float() - frames.float()).abs().mean() < 3
    found = videos.Files(annotations.read("folder", tmp_path, "all"), shortest=2)
    assert found.read(0, range(30, 50)).shape == (20, 3, 64, 64)
    assert check.problem(tmp_path, found.entries[0], window=2) is None


def test_files_of_different_sizes_stop_before_training(tmp_path):
    films.write(tmp_path / "a.avi", side=32)
    films.write(tmp_path / "b.avi", side=64)
    data = config.Data(dataset="folder", root=str(tmp_path), train="all")
    with pytest.raises(ValueError, match=r"data\.size: .*a\.avi of 32 x 32.*b\.avi of 64 x 64.*data\.size = \[H, W\]"):
        config.open_videos(data, "all", 16)
    for path in tmp_path.glob("*.avi"):
        decode.length(path)
    with pytest.raises(ValueError, match=r"data\.size"):
        config.open_videos(data, "all", 16)  # from the cache too
    content = films.write(tmp_path / "a.avi", 200, side=32).read_bytes()
    (tmp_path / "a.avi").write_bytes(content[: len(content) * 2 // 3])
    assert decode.size(tmp_path / "a.avi") == (32, 32), "damaged behind its first frame, so it is replaced"
    assert config.open_videos(data, "all", 16).read(0, [0]).shape == (1, 3, 64, 64)
    (tmp_path / "a.avi").write_bytes(b"<html>")
    assert config.open_videos(data, "all", 16).read(0, [0]).shape == (1, 3, 64, 64)


def test_data_check_lists_files_of_another_size(tmp_path):
    """They stop a run without data.size. The size to compare with is that of the first readable file."""
    (tmp_path / "a.avi").write_bytes(b"<html>")
    for name, side in ("b.avi", 32), ("c.avi", 64), ("d.avi", 32):
        films.write(tmp_path / name, side=side)
    counts = check.check("folder", tmp_path, "all", out=tmp_path / "check.csv", window=16)
    assert counts == dict(videos=4, fine=2, unreadable=1, size=1)
    lines = (tmp_path / "check.csv").read_text().splitlines()
    detail = "64 x 64, the first readable video has 32 x 32: set data.size = [H, W]"
    assert len(lines) == 3 and lines[1].startswith("a.avi,unreadable,") and lines[2] == f'c.avi,size,"{detail}"'
    assert "1 of another size" in check.summary("folder", counts, "check.csv")


def test_windows_among_identical_frames_are_read_exactly(tmp_path):
    """Most frames of the film are the same picture, so the reader must not guess their positions."""
    pictures = films.pictures(200, 64)
    for name, codec in ("still.mp4", "libx264"), ("still.avi", "mpeg4"), ("still.ts", "mpeg2video"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options=dict(g="10", bf="2"))
            stream.height = stream.width = 64
            stream.pix_fmt = "yuv420p"
            for i in range(200):
                frame = av.VideoFrame.from_ndarray(pictures[i if i % 50 > 40 else 0], format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode())
        expected = films.numbers(films.sequential(tmp_path / name))
        for decoder in DECODERS:
            assert wrong_windows(tmp_path / name, expected, 20, decoder) == 0


def test_the_index_is_made_once_and_kept(tmp_path, monkeypatch):
    path, made = write(tmp_path, "mpeg4_b.avi"), []
    make = index.make
    monkeypatch.setattr(index, "make", lambda path: made.append(path) or make(path))
    listing = annotations.read("folder", tmp_path, "all")
    check.check("folder", tmp_path, "all", out=tmp_path / "check.csv")
    forget()
    videos.Files(listing).read(0, range(9))
    assert len(made) == 1, "the check made the index, but a reader made it again"
    (file,) = (tmp_path / "indices").iterdir()
    whole = file.read_text()
    changed = whole.replace('"frames": 70', '"frames": 71')
    for damaged in ("", whole[:40], whole[:-9], changed, "\0" * 99, "[]", "x\n[]"):
        file.write_text(damaged)
        forget()
        assert decode.length(path) == 70 and file.read_text() == whole, damaged
    assert len(made) == 8
    (tmp_path / "bad.avi").write_bytes(b"<html>")
    for _ in range(2):
        forget()
        with pytest.raises(decode.Unreadable, match="no video file"):
            decode.length(tmp_path / "bad.avi")
    assert len(made) == 9, "an unreadable file was decoded again"


def test_an_index_of_another_file_or_library_is_not_trusted(tmp_path, monkeypatch):
    path = write(tmp_path, "mpeg4_b.avi", 40)
    assert decode.length(path) == 40
    write(tmp_path, "mpeg4_b.avi", 50)
    assert decode.length(path) == 50, "the same process used the index of the old file"
    status = path.stat()
    (file,) = (tmp_path / "indices").iterdir()
    checksum, text = file.read_text().split("\n")
    times = ("modified", status.st_mtime_ns - 1), ("changed", status.st_ctime_ns - 1)
    for name, value in ("size", status.st_size - 1), *times, ("libraries", ["1.0"]):
        plain = json.loads(text)
        plain["key"][name], plain["frames"] = value, 7
        stale = json.dumps(plain)
        file.write_text(f"{index._checksum(stale)}\n{stale}")
        forget()
        assert decode.length(path) == 50, name
    assert decode.length(write(tmp_path, "h264_b.mp4", 30)) == 30
    (other,) = (each for each in file.parent.iterdir() if each != file)
    file.write_text(other.read_text())
    forget()
    assert decode.length(path) == 50, "the index of another file was used"


def test_an_index_of_a_file_of_the_same_size_and_time_is_not_trusted(tmp_path):
    """Files that come out of one archive can have the same time, and those of one size can take each other's place."""
    path, other = write(tmp_path, "mpeg4_b.avi", 40), write(tmp_path, "mpeg4.avi", 50)
    size = max(path.stat().st_size, other.stat().st_size)
    for each in path, other:
        os.truncate(each, size)
        os.utime(each, (1, 1))
    lengths = decode.length(path), decode.length(other)
    other.replace(path)
    for forgotten in False, True:
        if forgotten:
            forget()
        assert decode.length(path) == lengths[1] != lengths[0]


def test_a_cache_folder_that_cannot_be_written_warns_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TCLR_INDEX", str(tmp_path / "file" / "indices"))
    path, other = write(tmp_path, "mpeg4_b.avi"), write(tmp_path, "h264_b.mp4")
    with pytest.warns(UserWarning, match="TCLR_INDEX") as told:
        assert decode.length(path) == decode.length(other) == 70
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert films.numbers(decode.read(path, [44])[0]) == [44]


def test_an_index_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write(tmp_path, "mpeg4_b.avi")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert decode.length(path) == 70
    assert list((tmp_path / "indices").iterdir()) == []


def test_a_missing_file_is_not_remembered_as_unreadable(tmp_path):
    path = write(tmp_path, "mpeg4_b.avi")
    path.rename(tmp_path / "elsewhere.avi")
    with pytest.raises(decode.Unreadable, match="No such file"):
        decode.length(path)
    (tmp_path / "elsewhere.avi").rename(path)
    assert decode.length(path) == 70


@pytest.mark.parametrize("name", CONTAINERS)
def test_truncated_files_are_read_exactly_or_refused_with_a_reason(tmp_path, name):
    """A file is cut at 20 lengths. If all of it can be decoded, all readers agree, and otherwise all refuse it."""
    content = write(tmp_path, name, 60).read_bytes()
    refused = 0
    for part in range(20):
        path = tmp_path / f"{part}" / name
        path.parent.mkdir()
        path.write_bytes(content[: len(content) * part // 20])
        listing = annotations.read("folder", path.parent, "all")
        found, problem = videos.Files(listing, shortest=2), check.problem(path.parent, listing.entries[0], window=2)
        try:
            whole = films.sequential(path)
        except (av.FFmpegError, IndexError, ValueError):
            whole = ()
        try:
            frames = decode.decode(path, decode.PYAV)
        except decode.Unreadable as error:
            refused += 1
            assert problem == ("unreadable", str(error)) and "\n" not in str(error)
            with pytest.raises(ValueError, match="cannot be read"):
                found.read(0, [0])
            assert found.bad == {name: str(error)}
            continue
        assert problem is None and torch.equal(frames, whole) and found.length(0) == len(whole)
        assert torch.equal(found.read(0, range(len(whole) // 2, len(whole))), whole[len(whole) // 2 :])
    assert refused >= 1 and (refused == 20 or name not in ("mpeg4_b.mov",))


@pytest.mark.parametrize("suffix", ["avi", "mp4", "mkv", "mov", "webm", "ts", "mpg"])
def test_files_without_video_are_refused_whatever_their_suffix(tmp_path, suffix):
    contents = {"empty": b"", "page": b"<!DOCTYPE html><html><body>404</body></html>" * 50, "noise": os.urandom(5000)}
    for name, content in contents.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        with pytest.raises(decode.Unreadable, match="no video|damaged|found 0 frames"):
            decode.length(path)


@pytest.mark.parametrize("suffix, codec", [("avi", "mp2"), ("mp4", "aac"), ("mkv", "aac"), ("mov", "aac"),
                                           ("webm", "libopus"), ("ts", "mp2"), ("mpg", "mp2")])  # fmt: skip
def test_files_with_audio_alone_are_refused_with_that_reason(tmp_path, suffix, codec):
    path = tmp_path / f"sound.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        size = stream.codec_context.frame_size or 1024
        for i in range(20):
            sound = av.AudioFrame(format=stream.codec_context.format.name, layout="mono", samples=size)
            sound.sample_rate, sound.pts = 48000, i * size
            for plane in sound.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(decode.Unreadable, match="audio alone"):
        decode.length(path)


def test_negative_positions_are_refused_and_later_ones_give_the_last_frame(tmp_path):
    path = write(tmp_path, "mpeg4.avi", 20)
    with pytest.raises(ValueError, match=r"positions: found \[-1\]"):
        decode.read(path, [-1])
    with pytest.raises(ValueError, match=r"positions: found \[\]"):
        decode.read(path, [])
    frames, held = decode.read(path, [18, 19, 20, 25])
    assert films.numbers(frames) == [18, 19, 19, 19] and held == 2


def test_a_file_that_becomes_shorter_repeats_its_last_frame_and_is_counted(tmp_path):
    write(tmp_path, "mpeg4.avi", 40)
    found = videos.Files(annotations.read("folder", tmp_path, "all"), shortest=16)
    assert found.length(0) == 40
    write(tmp_path, "mpeg4.avi", 30)
    assert films.numbers(found.read(0, [28, 33])) == [28, 29]
    assert found.counts["held"] == found.counts["decoded"] == 1
