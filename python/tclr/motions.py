"""A procedural video data set in UCF101's layout, where only motion over time tells the class.

A class is a pair of movements that take turns, so no short clip shows all of it. An actor is a shape, its texture, its
colours and a background; every actor performs every class, so no frame tells anything about the class.
"""

from itertools import combinations
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

MOVEMENTS = "Slide", "Bob", "Spin", "Pulse", "Orbit"
CLASSES = tuple(f"{a}And{b}" for a, b in combinations(MOVEMENTS, 2))
FRAME_RATE = 25


def write_dataset(root, *, groups, test_groups, takes, frames, side, seed, progress=iter):
    """Writes UCF-101/<Class>/v_<Class>_g##_c##.avi and ucfTrainTestlist/; groups up to `test_groups` are the test split.

    An actor is one (group, take), as UCF101's groups share scene and people. Returns the number of videos.
    """
    root = Path(root)
    train, test = [], []
    for name in CLASSES:
        (root / "UCF-101" / name).mkdir(parents=True, exist_ok=True)
    actors = [(group, take) for group in range(1, groups + 1) for take in range(1, takes + 1)]
    for group, take in progress(actors):
        actor = draw_actor(np.random.default_rng([seed, group, take]))
        for label, name in enumerate(CLASSES):
            video = f"{name}/v_{name}_g{group:02}_c{take:02}.avi"
            track = draw_track(name.split("And"), frames, np.random.default_rng([seed, group, take, label]))
            write_video(root / "UCF-101" / video, render(actor, track, side))
            if group <= test_groups:
                test.append(video)
            else:
                train.append(f"{video} {label + 1}")
    write_lists(root / "ucfTrainTestlist", train, test)
    return len(train) + len(test)


def write_lists(folder, train, test):
    """classInd.txt, trainlist01.txt and testlist01.txt with UCF101's CRLF line ends."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = [f"{i} {name}" for i, name in enumerate(CLASSES, 1)]
    for name, lines in ("classInd", classes), ("trainlist01", sorted(train)), ("testlist01", sorted(test)):
        (folder / f"{name}.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())


def write_video(path, frames):
    """Encodes MPEG-4 in AVI, as UCF101 is. frames: uint8 [F, H, W, 3]"""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=FRAME_RATE, options={"qmin": "2", "qmax": "5"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        convert = VideoReformatter()
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(convert.reformat(rgb, format="yuv420p", threads=1)))
        container.mux(stream.encode())


def draw_actor(rng):
    """The looks: everything a single frame can show. The shape is lighter or darker than what is behind it."""
    colours, background = rng.random((2, 2, 3), np.float32) * 0.45 + np.float32([0, 0.55])[rng.permutation(2), None, None]
    return dict(
        corners=int(rng.integers(2, 6)),
        depth=rng.uniform(0.25, 0.5),
        radius=rng.uniform(0.26, 0.38),
        stripes=rng.uniform(4, 12),
        colours=colours,
        background=background,
        slope=rng.uniform(-1, 1, 2).astype(np.float32),
    )


def draw_track(movements, frames, rng):
    """The actor's pose over time: a dict of x, y, angle, scale, each [F]. The two movements take turns.

    Where it starts is drawn as wide as the movements reach, so that one position tells little about them.
    """
    turns = draw_turns(frames, rng)
    pose = dict(x=np.zeros(frames), y=np.zeros(frames), angle=np.zeros(frames), scale=np.ones(frames))
    pose["x"] += rng.uniform(-0.35, 0.35)
    pose["y"] += rng.uniform(-0.35, 0.35)
    pose["scale"] *= rng.uniform(0.75, 1.25)
    pose["angle"] += rng.uniform(0, 2 * np.pi)
    for number, movement in enumerate(movements):
        rate, sense = rng.uniform(0.3, 0.5), rng.choice([-1, 1])
        clock = rng.uniform(0, 2 * np.pi) + sense * rate * np.cumsum(turns == number)
        move(pose, movement, clock, rng.uniform(0.3, 0.45))
    return pose


def draw_turns(frames, rng):
    """Whose turn it is, 0 or 1, in each frame; a turn takes 12 to 22 frames: [F]"""
    whose = rng.integers(2) + np.arange(frames // 12 + 2)
    turns = np.repeat(whose % 2, rng.integers(12, 23, len(whose)))
    start = rng.integers(12)
    return turns[start : start + frames]


def move(pose, movement, clock, reach):
    """Adds one movement to a pose. clock: [F], in radians, standing still while the other movement has its turn."""
    if movement in ("Slide", "Orbit"):
        pose["x"] += reach * np.sin(clock)
    if movement in ("Bob", "Orbit"):
        pose["y"] += reach * np.cos(clock)
    if movement == "Spin":
        pose["angle"] += 0.7 * clock
    if movement == "Pulse":
        pose["scale"] *= 1 + reach * np.sin(clock)


def render(actor, track, side):
    """Frames of a striped star-like shape on a shaded background, coordinates in [-1, 1]: uint8 [F, side, side, 3]"""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    pose = {name: values.astype(np.float32)[:, None, None] for name, values in track.items()}
    dx, dy = axis[None, None, :] - pose["x"], axis[None, :, None] - pose["y"]
    cos, sin = np.cos(pose["angle"]), np.sin(pose["angle"])
    u, v = (cos * dx + sin * dy) / pose["scale"], (cos * dy - sin * dx) / pose["scale"]
    edge = actor["radius"] * (1 + actor["depth"] * np.cos(actor["corners"] * np.arctan2(v, u)))
    inside = np.clip((edge - np.hypot(u, v)) * side / 2 + 0.5, 0, 1)[..., None]
    stripe = (0.5 + 0.5 * np.sin(actor["stripes"] * u))[..., None]
    shade = 0.5 + 0.5 * np.clip(axis[None, :] * actor["slope"][0] + axis[:, None] * actor["slope"][1], -1, 1)[..., None]
    looks = actor["colours"][0] * stripe + actor["colours"][1] * (1 - stripe)
    behind = actor["background"][0] * shade + actor["background"][1] * (1 - shade)
    return (255 * (inside * looks + (1 - inside) * behind)).astype(np.uint8)
