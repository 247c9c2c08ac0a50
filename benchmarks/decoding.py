"""python -m benchmarks.decoding: how many videos a second the trainer and the official code read and augment.

The official code decodes every file with OpenCV, from the first frame to the last, and augments frame by frame with
torchvision's functions on PIL images, in the workers of a data loader. Those functions are written out here. The
trainer reads only the 64-frame window and augments clip by clip, in threads. Both work on two videos at a time, each
with one PyTorch thread. The index of each file exists already; index_cpu_ms is the time to make it.

OpenCV decodes each file with several threads, so on a busy machine it gets a larger share of the CPU than the trainer.
one_thread_ratio compares with OpenCV on one decoding thread for each file. The columns with cpu use the CPU time of all
threads and processes, which other work on the machine hardly changes. With --before, the trainer at another commit is
measured too. All take turns, and the rows have the medians.
"""

import argparse
import importlib
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import PIL
import torch
from PIL import Image, ImageEnhance

from . import rows

sys.path.insert(0, str(rows.ROOT / "python"))
from tclr import annotations, augment, clips, decode, index, motions, videos  # noqa: E402

FRAMES, HEIGHT, WIDTH, SIDE = 180, 240, 320, 112
PLAN = clips.ClipPlan()
CASES = {"window": "frames of the 64-frame window", "clips": "window + 2 global and 8 local augmented clips"}
COLUMNS = [
    *("case", "files", "key_frames_every", "status", "release_per_s", "trainer_per_s", "ratio", "ratio_lowest"),
    *(
        "cpu_ratio",
        "one_thread_ratio",
        "index_cpu_ms",
        "before",
        "before_per_s",
        "of_before",
        "of_before_lowest",
        "cpu_of_before",
        "rounds",
        "videos",
    ),
    *("decoder", "opencv", "pillow", "cpu", "threads", "torch", "python", "commit", "date"),
]


KINDS = {  # file's ending -> codec, options, decoders; UCF101 is 320x240 MPEG-4 in AVI
    "avi": ("mpeg4", dict(qmin="4"), [decode.PYAV]),
    "mp4": ("libx264", dict(preset="fast", bf="2"), list(dict.fromkeys([decode.PYAV, decode.DECODER]))),
}


def write_files(folder, count, kind, key_frames_every):
    codec, options, _ = KINDS[kind]
    for i in range(count):
        rng = np.random.default_rng(i)
        track = motions.draw_track(motions.CLASSES[i % len(motions.CLASSES)], FRAMES, rng)
        pictures = motions.render(motions.draw_actor(rng), track, WIDTH)[:, :HEIGHT]
        with av.open(str(folder / f"{i}.{kind}"), "w") as container:
            always = {"g": str(key_frames_every), "sc_threshold": "1000000000"}
            stream = container.add_stream(codec, rate=25, options=options | always)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for picture in pictures:
                picture = (picture + rng.integers(-6, 7, (HEIGHT, WIDTH, 1))).clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def release_window(path, decoding=()):
    """Decodes every frame of a file and keeps a window. decoding: options of OpenCV."""
    capture, frames = cv2.VideoCapture(path, cv2.CAP_FFMPEG, decoding), []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(frame)
    start = random.randint(0, len(frames) - PLAN.window)
    return frames[start : start + PLAN.window]


def release_clips(path, decoding=()):
    window = release_window(path, decoding)
    chosen = torch.cat(PLAN.cut(torch.arange(PLAN.window)[None])).tolist()
    return [torch.stack([augmented(window[p], drawn) for p in clip]) for clip in chosen for drawn in (draw(), draw())]


def draw():
    """The augmentation parameters of a clip, in the ranges of the official code."""
    side = int(random.uniform(0.6, 1) * HEIGHT)
    names = dict(contrast=0.125, hue=0.3, saturation=0.3, brightness=0.3, gray=0.175, flip=0.5, erase=0.5)
    drawn = {name: random.random() < p for name, p in names.items()}
    factors = {name: random.uniform(0.75, 1.25) for name in ("contrast", "saturation", "brightness", "gamma")}
    box = random.randint(0, WIDTH - side), random.randint(0, HEIGHT - side), side
    return drawn, factors, box, random.randint(-25, 25)


def augmented(frame, parameters):
    """Augments one frame, in OpenCV's order blue-green-red: float [3, 112, 112]"""
    drawn, factors, (left, top, side), turn = parameters
    image = Image.fromarray(frame).crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.BILINEAR)
    if drawn["contrast"]:
        image = ImageEnhance.Contrast(image).enhance(factors["contrast"])
    if drawn["hue"]:
        hue, saturation, value = image.convert("HSV").split()
        hue = Image.fromarray(np.array(hue) + np.uint8(turn % 256))
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if drawn["saturation"]:
        image = ImageEnhance.Color(image).enhance(factors["saturation"])
    if drawn["brightness"]:
        image = ImageEnhance.Brightness(image).enhance(factors["brightness"])
    if drawn["gray"]:
        image = (
            image.convert("L").convert("RGB").point([int(255 * (i / 255) ** factors["gamma"]) for i in range(256)] * 3)
        )
    if drawn["flip"]:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    if drawn["erase"]:
        pixels[:, 30:44, 30:44] = 0
    return pixels


def release_work(case, decoding, path):
    """Runs in a worker process. The clips stay there, so the official code is not charged for sending them back."""
    started = time.process_time()
    assert len({"window": release_window, "clips": release_clips}[case](path, decoding))
    return time.process_time() - started


def release_round(case, pool, paths, decoding=()):
    """Returns the processor's seconds."""
    return sum(pool.map(partial(release_work, case, decoding), paths))


def trainer_work(case, found, i, seed):
    """Runs in a thread: reads the window once and makes all ten clips from it."""
    generator = torch.Generator().manual_seed(seed)
    windows = clips.random_windows(found, [i], PLAN, generator)
    if case == "clips":
        augmentation = augment.ReleaseAugment(SIDE, generator)
        made = [augmentation(some, views=2) for some in PLAN.cut(windows)]
        return sum(map(len, made)) == 10
    return len(windows[0]) == PLAN.window


def trainer_round(case, pool, found, seeds):
    """Returns the processor's seconds."""
    started = time.process_time()
    assert all(pool.map(partial(trainer_work, case, found), range(len(found)), seeds))
    return time.process_time() - started


def timed(work, count):
    """(videos a second, videos for each second of CPU time)"""
    started = time.perf_counter()
    busy = work()
    return count / (time.perf_counter() - started), count / busy


def index_work(path):
    started = time.process_time()
    index.make(path)
    return 1000 * (time.process_time() - started)


def measure(case, folder, decoder, before, rounds, processes, threads):
    """The row of a case, from all files of a folder. before: the module `videos` of another commit, or None."""
    listing = annotations.read("folder", folder, "all")
    found = videos.Files(listing, decoder=decoder)
    paths = [str(folder / name) for name in found.names]
    index_ms = statistics.median(map(index_work, paths))
    seeds = itertools.count()
    works = [partial(release_round, case, processes, paths), partial(trainer_round, case, threads, found, seeds)]
    works.append(partial(release_round, case, processes, paths, (cv2.CAP_PROP_N_THREADS, 1)))
    if before:
        works.append(partial(trainer_round, case, threads, before.Files(listing, decoder=decoder), seeds))
    for work in works:
        work()
    rates = [[timed(work, len(paths)) for work in works] for _ in range(rounds)]
    walls, busy = ([[rate[kind] for rate in rates_of] for rates_of in rates] for kind in (0, 1))
    theirs, ours, single, *earlier = (statistics.median(rate) for rate in zip(*walls, strict=True))
    cpu = [statistics.median(rate) for rate in zip(*busy, strict=True)]
    values = dict(rounds=rounds, videos=len(paths), index_cpu_ms=f"{index_ms:.0f}", cpu_ratio=f"{cpu[1] / cpu[0]:.2f}")
    values.update(release_per_s=f"{theirs:.1f}", trainer_per_s=f"{ours:.1f}", ratio=f"{ours / theirs:.2f}")
    values.update(ratio_lowest=f"{min(rate[1] / rate[0] for rate in walls):.2f}")
    values.update(one_thread_ratio=f"{ours / single:.2f}")
    if earlier:
        values.update(before_per_s=f"{earlier[0]:.1f}", of_before=f"{ours / earlier[0]:.2f}")
        values.update(of_before_lowest=f"{min(rate[1] / rate[3] for rate in walls):.2f}")
        values.update(cpu_of_before=f"{cpu[1] / cpu[3]:.2f}")
    return values


def package_at(commit, folder):
    """The trainer's module `videos` at a commit, imported under another name."""
    archive = subprocess.run(["git", "archive", commit, "python/tclr"], cwd=rows.ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    (Path(folder) / "python/tclr").rename(Path(folder) / "tclr_before")
    sys.path.insert(0, folder)
    return importlib.import_module("tclr_before.videos")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--key-frames-every", type=int, nargs="*", default=[12, 250])
    parser.add_argument("--files", choices=KINDS, nargs="*", default=list(KINDS))
    parser.add_argument("--before", help="a commit whose trainer is measured too")
    parser.add_argument("--out", type=Path, default=rows.default_path("decoding"))
    arguments = parser.parse_args()
    return rows.record(arguments.out, COLUMNS, lines(arguments))


def lines(arguments):
    """A row for each kind of file, distance of key frames, decoder and case."""
    torch.set_num_threads(1)
    versions = dict(opencv=cv2.__version__, pillow=PIL.__version__, before=arguments.before)
    alone = partial(ProcessPoolExecutor, initializer=torch.set_num_threads, initargs=(1,))  # as a data loader does
    with (
        alone(2) as processes,
        ThreadPoolExecutor(2) as threads,
        tempfile.TemporaryDirectory() as scratch,
    ):
        os.environ["TCLR_INDEX"] = f"{scratch}/indices"
        before = package_at(arguments.before, scratch) if arguments.before else None
        for kind, every in itertools.product(arguments.files, arguments.key_frames_every):
            folder = Path(scratch) / f"{kind}-{every}"
            folder.mkdir()
            write_files(folder, arguments.videos, kind, every)
            for decoder, case in itertools.product(KINDS[kind][2], CASES):
                made = rows.attempted(measure, case, folder, decoder, before, arguments.rounds, processes, threads)
                files = f"{KINDS[kind][0]} in {kind}"
                yield dict(case=CASES[case], files=files, key_frames_every=every, decoder=decoder) | made | versions


if __name__ == "__main__":
    sys.exit(main())
