"""python -m benchmarks.decoding: videos a second from file to clips, the trainer's way and the official release's.

The release decodes every file by OpenCV from its first frame to its last, and augments frame by frame on the host with
torchvision's functions on PIL images, in the worker processes of a data loader; those functions are written out here,
as torchvision does them. The trainer reads the 64-frame window alone, and augments clip by clip, in threads. Both work
on two videos at a time, each with one PyTorch thread. Rounds of the two alternate; what is written is the median.
"""

import argparse
import itertools
import random
import statistics
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
from tclr import annotations, augment, clips, decode, motions, videos  # noqa: E402

FRAMES, HEIGHT, WIDTH, SIDE = 180, 240, 320, 112
PLAN = clips.ClipPlan()
CASES = {"window": "frames of the 64-frame window", "clips": "window + 2 global and 8 local augmented clips"}
COLUMNS = [
    *("case", "key_frames_every", "status", "release_per_s", "trainer_per_s"),
    *("ratio", "ratio_lowest", "rounds", "videos"),
    *("decoder", "opencv", "pillow", "cpu", "threads", "torch", "python", "commit", "date"),
]


def write_files(folder, count, key_frames_every):
    """320x240 MPEG-4 in AVI, as UCF101 is."""
    for i in range(count):
        rng = np.random.default_rng(i)
        track = motions.draw_track(motions.CLASSES[i % len(motions.CLASSES)], FRAMES, rng)
        pictures = motions.render(motions.draw_actor(rng), track, WIDTH)[:, :HEIGHT]
        with av.open(str(folder / f"{i}.avi"), "w") as container:
            options = {"g": str(key_frames_every), "sc_threshold": "1000000000", "qmin": "4"}
            stream = container.add_stream("mpeg4", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for picture in pictures:
                picture = (picture + rng.integers(-6, 7, (HEIGHT, WIDTH, 1))).clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def release_window(path):
    """Every frame of the file, of which a window is kept."""
    capture, frames = cv2.VideoCapture(path), []
    while True:
        found, frame = capture.read()
        if not found:
            break
        frames.append(frame)
    start = random.randint(0, len(frames) - PLAN.window)
    return frames[start : start + PLAN.window]


def release_clips(path):
    window = release_window(path)
    chosen = [range(0, PLAN.window, PLAN.stride), *PLAN.local_frames().tolist()]
    return [torch.stack([augmented(window[p], drawn) for p in clip]) for clip in chosen for drawn in (draw(), draw())]


def draw():
    """The parameters of a clip, in the release's ranges."""
    side = int(random.uniform(0.6, 1) * HEIGHT)
    names = dict(contrast=0.125, hue=0.3, saturation=0.3, brightness=0.3, gray=0.175, flip=0.5, erase=0.5)
    drawn = {name: random.random() < p for name, p in names.items()}
    factors = {name: random.uniform(0.75, 1.25) for name in ("contrast", "saturation", "brightness", "gamma")}
    box = random.randint(0, WIDTH - side), random.randint(0, HEIGHT - side), side
    return drawn, factors, box, random.randint(-25, 25)


def augmented(frame, parameters):
    """One frame, BGR as OpenCV has it: float [3, 112, 112]"""
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


def release_work(case, path):
    """In a worker process; what it made stays there, so that carrying it over is not counted against the release."""
    return len({"window": release_window, "clips": release_clips}[case](path))


def release_round(case, pool, paths):
    assert all(pool.map(partial(release_work, case), paths))


def trainer_work(case, found, i, seed):
    """In a thread of its own: the window, read once, and all ten clips from it."""
    generator = torch.Generator().manual_seed(seed)
    windows = clips.random_windows(found, [i], PLAN.window, generator)
    if case == "clips":
        augmentation = augment.ReleaseAugment(SIDE, generator)
        made = [augmentation(some, views=2) for some in PLAN.cut(windows)]
        return sum(map(len, made)) == 10
    return len(windows[0]) == PLAN.window


def trainer_round(case, pool, found, seeds):
    assert all(pool.map(partial(trainer_work, case, found), range(len(found)), seeds))


def timed(function, count):
    started = time.perf_counter()
    function()
    return count / (time.perf_counter() - started)


def measure(case, folder, rounds, processes, threads):
    """The row of a case, over all files of a folder."""
    found = videos.Files(annotations.read("folder", folder, "all"))
    paths = [str(folder / name) for name in found.names]
    release = partial(release_round, case, processes, paths)
    trainer = partial(trainer_round, case, threads, found, itertools.count())
    release(), trainer()
    rates = [(timed(release, len(paths)), timed(trainer, len(paths))) for _ in range(rounds)]
    theirs, ours = (statistics.median(rate) for rate in zip(*rates, strict=True))
    values = dict(release_per_s=f"{theirs:.1f}", trainer_per_s=f"{ours:.1f}", ratio=f"{ours / theirs:.2f}")
    return values | dict(ratio_lowest=f"{min(b / a for a, b in rates):.2f}", rounds=rounds, videos=len(paths))


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--key-frames-every", type=int, nargs="*", default=[12, 250])
    parser.add_argument(
        "--out", type=Path, default=rows.RESULTS / rows.default_path().name.replace("cpu-", "decoding-")
    )
    arguments = parser.parse_args()
    here = dict(rows.here(), decoder=decode.DECODER, opencv=cv2.__version__, pillow=PIL.__version__)
    failures = 0
    torch.set_num_threads(1)
    alone = partial(ProcessPoolExecutor, initializer=torch.set_num_threads, initargs=(1,))  # as a data loader does
    with alone(2) as processes, ThreadPoolExecutor(2) as threads, rows.writing(arguments.out, COLUMNS) as add:
        for every in arguments.key_frames_every:
            with tempfile.TemporaryDirectory() as folder:
                write_files(Path(folder), arguments.videos, every)
                for case, title in CASES.items():
                    made = rows.attempted(measure, case, Path(folder), arguments.rounds, processes, threads)
                    made = dict(case=title, key_frames_every=every) | made
                    print(made, flush=True)
                    add(here | made)
                    failures += made["status"] != "ok"
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
