"""Writes small videos whose frame i shows the number i, in many containers and codecs, with and without B-frames.

A frame has 4 x 4 cells, which are dark or light: the binary digits of its number. The `ffmpeg` program writes most of
the films. PyAV writes those that it can, so that they can be tested without the program.
"""

import contextlib
import itertools
import os
import random
import shutil
import subprocess
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

FFMPEG = shutil.which("ffmpeg")
SIDE, FRAMES = 64, 70
GOPS = ("short", "long", "open", "refresh")
MPEG = "-q:v 3 -sc_threshold 1000000000"
CODECS = {  # codec -> (encoder, its options, its options for each placement of key frames)
    "mpeg4": ("mpeg4", "-q:v 3", dict(short="-g 10", long="-g 300", open="-g 12")),
    "xvid": ("libxvid", "-q:v 3", dict(short="-g 10", long="-g 300")),
    "h264": (
        "libx264",
        "-preset veryfast -crf 18",
        dict(
            short="-g 10 -x264-params scenecut=0",
            long="-g 300 -x264-params scenecut=0",
            open="-g 12 -x264-params open-gop=1:scenecut=0",
            refresh="-g 14 -x264-params intra-refresh=1:scenecut=0",
        ),
    ),
    "hevc": (
        "libx265",
        "-preset ultrafast -crf 18",
        dict(
            short="-x265-params keyint=10:min-keyint=10:open-gop=0:scenecut=0:log-level=0{b}",
            long="-x265-params keyint=300:scenecut=0:log-level=0{b}",
            open="-x265-params keyint=12:min-keyint=12:open-gop=1:scenecut=0:log-level=0{b}",
            refresh="-x265-params keyint=14:intra-refresh=1:scenecut=0:log-level=0{b}",
        ),
    ),
    "mpeg1": ("mpeg1video", MPEG, dict(short="-g 10 -flags +cgop", long="-g 300", open="-g 12")),
    "mpeg2": ("mpeg2video", MPEG, dict(short="-g 10 -flags +cgop", long="-g 300", open="-g 12")),
    "vp9": ("libvpx-vp9", "-deadline realtime -cpu-used 8 -b:v 1M", dict(short="-g 10", long="-g 300")),
    "av1": ("libsvtav1", "-preset 12 -crf 20", dict(short="-g 10", long="-g 300")),
}
CONTAINERS = {
    "avi": ("mpeg4", "xvid", "h264", "mpeg2"),
    "mp4": ("mpeg4", "xvid", "h264", "hevc", "mpeg1", "mpeg2", "vp9", "av1"),
    "mkv": ("mpeg4", "xvid", "h264", "hevc", "mpeg1", "mpeg2", "vp9", "av1"),
    "mov": ("mpeg4", "xvid", "h264", "hevc", "mpeg2"),
    "webm": ("vp9", "av1"),
    "ts": ("mpeg4", "h264", "hevc", "mpeg1", "mpeg2"),
    "mpg": ("mpeg1", "mpeg2", "h264"),
}
STARTS = "none", "late", "cut"
TURNS = 0, 90, 180, 270


@dataclass(frozen=True)
class Film:
    """A combination of properties. start: "late" by 3 s, or "cut" out of a longer film by `-ss 0.9 -c copy`."""

    container: str
    codec: str
    b_frames: bool
    gop: str
    start: str
    turn: int

    @property
    def name(self):
        words = self.codec, "b" if self.b_frames else "no-b", self.gop, self.start, str(self.turn)
        return "_".join(words) + "." + self.container

    @property
    def alike_in_all_versions(self):
        """Whether all versions of ffmpeg agree. Old ones show hidden frames of AV1, and hide some packed B-frames."""
        return self.start != "cut" or self.codec not in ("av1", "xvid")

    @property
    def impossible(self):
        """Whether the encoder writes no such B-frames, or there is no key frame at which to cut."""
        if self.b_frames and (self.codec in ("vp9", "av1") or self.gop == "refresh"):
            return True
        one_key_frame = self.gop == "long" or (self.codec, self.gop) == ("hevc", "refresh")
        return self.start == "cut" and self.container == "ts" and one_key_frame


def matrix():
    """Every film that its codec and container allow."""
    for container, codecs in CONTAINERS.items():
        turns = TURNS if container in ("mp4", "mov") else TURNS[:1]
        for codec, b_frames, gop, start, turn in itertools.product(codecs, (True, False), GOPS, STARTS, turns):
            film = Film(container, codec, b_frames, gop, start, turn)
            if gop in CODECS[codec][2] and not film.impossible:
                yield film


def pictures(frames, side=SIDE):
    """uint8 [frames, side, side, 3]"""
    digits = (np.arange(frames)[:, None] >> np.arange(16)) & 1
    cells = np.where(digits, 220, 30).astype(np.uint8).reshape(-1, 4, 4)
    cells = cells.repeat(side // 4, 1).repeat(side // 4, 2)
    return np.repeat(cells[..., None], 3, 3)


def numbers(frames):
    """The numbers that frames show. [P, 3, H, W] -> list of P"""
    assert frames.dtype == torch.uint8 and frames.shape[1] == 3
    cells = frames.float().mean(1).unflatten(1, (4, -1)).unflatten(3, (4, -1)).mean((2, 4))
    return ((cells.flatten(1) > 125).int() << torch.arange(16)).sum(1).tolist()


@contextlib.contextmanager
def kept_scheduling():
    """Restores the scheduling policy: run by root, SVT-AV1 gives the calling thread a real-time policy. Child processes
    would inherit it, and nothing else would run while they compute."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write(path, frames=20, codec="mpeg4", options=None, side=32, first=0):
    """Writes frames of the numbers from `first` on, by PyAV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "vob" if path.suffix == ".mpg" else None
    with kept_scheduling(), av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height = stream.width = side
        stream.pix_fmt = "yuv420p"
        for picture in pictures(first + frames, side)[first:]:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return path


def copied(source, path, times=lambda pts, dts: (pts, dts)):
    """Copies packets, as `ffmpeg -c copy` does, with changed timestamps, in thousandths of a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                ticks = [float(time * packet.time_base * 25000) for time in (packet.pts, packet.dts)]
                packet.time_base = Fraction(1, 25000)
                packet.pts, packet.dts = map(round, times(*ticks))
                packet.stream = stream
                container.mux(packet)
    return path


def sequential(path):
    """All frames as PyAV decodes them from the beginning, neither rotated nor resized: uint8 [F, 3, H, W]"""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def windows(path, total, count, seed=0):
    """Positions of `count` random windows of up to 32 frames."""
    rng = random.Random(f"{Path(path).name} {seed}")
    for _ in range(count):
        length = min(rng.choice((1, 2, 8, 16, 32)), total)
        start = rng.randrange(total - length + 1)
        yield range(start, start + length)


def shoot(film, folder):
    """Writes a film with the ffmpeg program, unless the file exists."""
    path = Path(folder) / film.name
    if path.exists():
        return path
    encoder, always, kinds = CODECS[film.codec]
    b = 3 if film.b_frames else 0
    kind = kinds[film.gop].format(b=f":bframes={b}")
    options = f"-c:v {encoder} {always} {kind} -pix_fmt yuv420p " + ("" if film.codec in ("vp9", "av1") else f"-bf {b}")
    raw = f"-f rawvideo -pix_fmt rgb24 -s {SIDE}x{SIDE} -r 25 -i -"
    late = "-output_ts_offset 3" if film.start == "late" else ""
    form = "-f vob" if film.container == "mpg" and film.codec != "mpeg1" else ""
    plain = replace(film, start="none", turn=0)
    if film.codec == "xvid":  # libxvid only writes packed B-frames to AVI, so other containers get copies of that file
        plain = replace(plain, container="avi")
    if film == plain:
        return run(f"{raw} {options} {form}", path, pictures(FRAMES).tobytes())
    whole = shoot(plain, folder)
    cut = "-fflags +genpts" + " -ss 0.9" * (film.start == "cut")
    turn = f"-metadata:s:v:0 rotate={film.turn}" if film.turn else ""
    return run(f"{cut} -i {whole} -c copy {late} {turn} {form}", path)


def run(arguments, path, given=None):
    done = subprocess.run(
        [FFMPEG, "-v", "error", "-y", *arguments.split(), str(path)], input=given, capture_output=True, check=False
    )
    if done.returncode:
        path.unlink(missing_ok=True)
        raise RuntimeError(f"{path.name}: {done.stderr.decode()[-300:]}")
    return path


def oracle(path):
    """All frames that the ffmpeg program decodes from a file: uint8 [F, 3, H, W]"""
    done = subprocess.run(
        [FFMPEG, "-v", "error", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough",
         "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"], capture_output=True, check=False,
    )  # fmt: skip
    frames, rest = [], done.stdout
    while rest:
        _, size, _, data = rest.split(b"\n", 3)
        width, height = map(int, size.split())
        frames.append(np.frombuffer(data[: 3 * width * height], np.uint8).reshape(height, width, 3))
        rest = data[3 * width * height :]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
