"""A generated video data set in UCF101's layout, in which only motion over time identifies the class.

A class is a movement. All videos of a group have the same appearance (shape, texture, colours and background). Every
group has videos of every class, with positions and sizes from the same distribution, so that a single frame contains no
information about the class.

CLASSES are single movements that last the whole video. CHANGES are two movements in a row, where each order is another
class, so that a clip before or after the change cannot identify the class, and an average over time cannot identify the
order. ROUTINES are three movements, each for a third of the video, in a random order. A clip that is shorter than a
third shows one or two of them, so it cannot identify the class, but several clips together can. Waves drift behind the
actor with a constant direction and speed, which do not depend on the class.
"""

from itertools import permutations, product
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from .videos import Loaded

MOVEMENTS = {  # name -> the coordinate that changes, and the direction
    "SlideLeft": ("x", -1),
    "SlideRight": ("x", 1),
    "SlideUp": ("y", -1),
    "SlideDown": ("y", 1),
    "SpinLeft": ("angle", -1),
    "SpinRight": ("angle", 1),
    "ZoomIn": ("zoom", 1),
    "ZoomOut": ("zoom", -1),
    "SwingAcross": ("x", 0),
    "SwingUpright": ("y", 0),
}
CLASSES = tuple(MOVEMENTS)
CHANGES = tuple(f"{a}Then{b}" for a, b in permutations(("SlideRight", "SlideUp", "SpinLeft", "ZoomIn"), 2))
CHOICES = ("SlideLeft", "SlideRight"), ("SwingAcross", "SwingUpright"), ("Pulse", "Wobble")  # a routine has one of each
ROUTINES = tuple("And".join(movements) for movements in product(*CHOICES))
MIRRORED = tuple(zip(ROUTINES[:4], ROUTINES[4:], strict=True))  # pairs: a video of one, backwards, is one of the other
SLIDES = dict(SlideLeft=-0.09, SlideRight=0.09)  # in routines: the change of x in a frame
SWINGS = dict(SwingAcross="x", SwingUpright="y", Pulse="zoom", Wobble="angle")
FRAME_RATE = 25


def write_dataset(root, *, groups, test_groups, takes, frames, side, seed, progress=iter):
    """Writes UCF-101/<Class>/v_<Class>_g##_c##.avi and ucfTrainTestlist/; the first `test_groups` are the test split.

    As in UCF101, the videos of a group share their scene. Returns the number of videos.
    """
    root = Path(root)
    train, test = [], []
    for name in CLASSES:
        (root / "UCF-101" / name).mkdir(parents=True, exist_ok=True)
    scenes = [(group, take) for group in range(1, groups + 1) for take in range(1, takes + 1)]
    for group, take in progress(scenes):
        actor = draw_actor(np.random.default_rng([seed, group]))
        for label, name in enumerate(CLASSES):
            video = f"{name}/v_{name}_g{group:02}_c{take:02}.avi"
            track = draw_track(name, frames, randomness(seed, group, take, label))
            write_video(root / "UCF-101" / video, render(actor, track, side))
            if group <= test_groups:
                test.append(video)
            else:
                train.append(f"{video} {label + 1}")
    write_lists(root / "ucfTrainTestlist", train, test)
    return len(train) + len(test)


def generate(*, classes, groups, first_group, takes, frames, side, seed):
    """Generates such videos in memory."""
    names, videos, labels = [], [], []
    for group in range(first_group, first_group + groups):
        actor = draw_actor(np.random.default_rng([seed, group]))
        for take in range(1, takes + 1):
            for label, name in enumerate(classes):
                draw = draw_routine if name in ROUTINES else draw_track
                track = draw(name, frames, randomness(seed, group, take, label))
                videos.append(torch.from_numpy(render(actor, track, side)).permute(0, 3, 1, 2).contiguous())
                names.append(f"{name}/v_{name}_g{group:02}_c{take:02}")
                labels.append(label)
    return Loaded(names, videos, torch.tensor(labels))


def randomness(seed, group, take, label):
    """The random generator for the movements of a video, which depends on the arguments only."""
    return np.random.default_rng([seed, group, take, label])


def write_lists(folder, train, test):
    """Writes classInd.txt, trainlist01.txt and testlist01.txt with CRLF line ends, as in UCF101."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = [f"{i} {name}" for i, name in enumerate(CLASSES, 1)]
    for name, lines in ("classInd", classes), ("trainlist01", sorted(train)), ("testlist01", sorted(test)):
        (folder / f"{name}.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())


def write_video(path, frames):
    """Writes a video as MPEG-4 in AVI, as in UCF101. frames: uint8 [F, H, W, 3]"""
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
    """A random appearance: shape, texture, colours. The shape is always lighter or darker than the background."""
    colours, background = (
        rng.random((2, 2, 3), np.float32) * 0.45 + np.float32([0, 0.55])[rng.permutation(2), None, None]
    )
    return dict(
        corners=int(rng.integers(2, 6)),
        depth=rng.uniform(0.25, 0.5),
        radius=rng.uniform(0.26, 0.38),
        stripes=rng.uniform(4, 12),
        colours=colours,
        background=background,
        slope=rng.uniform(-1, 1, 2).astype(np.float32),
    )


def draw_track(movement, frames, rng):
    """The actor's pose over time: a dict of x, y, angle, scale, each [F].

    Slides leave on one side and come back on the other, and zooms start again, so that every frame is equally likely in
    every class.
    """
    time = np.arange(frames)
    pose = dict(x=rng.uniform(-1, 1) + 0 * time, y=rng.uniform(-1, 1) + 0 * time)
    pose.update(angle=rng.uniform(0, 2 * np.pi) + 0 * time, zoom=rng.uniform(0, 1) + 0 * time)
    speed = rng.uniform(0.8, 1.25)
    parts = movement.split("Then")
    change = frames if len(parts) == 1 else rng.uniform(0.35, 0.65) * frames
    for part, elapsed in zip(parts, (np.minimum(time, change), np.maximum(time - change, 0)), strict=False):
        what, way = MOVEMENTS[part]
        if part.startswith("Swing"):
            pose[what] += 0.4 * np.sin(rng.uniform(0, 2 * np.pi) + 0.3 * speed * elapsed)
        else:
            pose[what] += way * dict(x=0.06, y=0.06, angle=0.12, zoom=0.03)[what] * speed * elapsed
    pose["x"], pose["y"] = (wrap(pose[axis], 1.2) for axis in "xy")
    pose["scale"] = 0.65 * 2.4 ** (pose.pop("zoom") % 1)
    return pose


def draw_routine(routine, frames, rng):
    """The actor's pose over time, as in `draw_track`, and that of the waves behind it.

    All movements are periodic and start at a random phase. So every frame is equally likely at any time and in any
    routine, and a video that is played backwards is as likely as a video of the mirrored routine.
    """
    phases = draw_phases(routine, frames, rng)
    start = dict(x=rng.uniform(-1, 1), y=rng.uniform(-0.4, 0.4), angle=rng.uniform(0, 2 * np.pi))
    pose, speed = {axis: np.full(frames, value) for axis, value in start.items()}, rng.uniform(0.8, 1.25)
    beats = {axis: rng.uniform(0, 2 * np.pi) + np.zeros(frames) for axis in ("x", "y", "angle", "zoom")}
    for movement, first, last in phases:
        elapsed = np.clip(np.arange(frames), first, last) - first
        if movement in SLIDES:
            pose["x"] += SLIDES[movement] * speed * elapsed
        else:
            beats[SWINGS[movement]] += 0.5 * speed * elapsed
    pose["x"] = wrap(pose["x"] + 0.5 * np.sin(beats["x"]), 1)
    pose["y"] += 0.5 * np.sin(beats["y"])
    pose["angle"] += 1.4 * np.sin(beats["angle"])
    pose["scale"] = 1.25 * 1.8 ** np.sin(beats["zoom"])
    direction, waves = rng.uniform(0, 2 * np.pi), rng.uniform(4, 9)
    pose["wave_x"], pose["wave_y"] = (np.full(frames, waves * part) for part in (np.cos(direction), np.sin(direction)))
    pose["drift"] = rng.uniform(0, 2 * np.pi) + rng.uniform(0.3, 0.9) * np.arange(frames)
    return pose


def draw_phases(routine, frames, rng):
    """[(movement, first frame, last frame), ...] in random order, each for about a third of the video (within 2 %)."""
    movements = rng.permutation(routine.split("And")).tolist()
    cuts = np.rint((np.arange(1, 3) / 3 + rng.uniform(-0.01, 0.01, 2)) * frames).astype(int).tolist()
    return list(zip(movements, [0, *cuts], [*cuts, frames - 1], strict=True))


def wrap(position, edge):
    return (position + edge) % (2 * edge) - edge


def render(actor, track, side):
    """Draws a striped star on a shaded background: uint8 [F, side, side, 3]. Coordinates are in [-1, 1]."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    pose = {name: values.astype(np.float32)[:, None, None] for name, values in track.items()}
    dx, dy = axis[None, None, :] - pose["x"], axis[None, :, None] - pose["y"]
    cos, sin = np.cos(pose["angle"]), np.sin(pose["angle"])
    u, v = (cos * dx + sin * dy) / pose["scale"], (cos * dy - sin * dx) / pose["scale"]
    edge = actor["radius"] * (1 + actor["depth"] * np.cos(actor["corners"] * np.arctan2(v, u)))
    inside = np.clip((edge - np.hypot(u, v)) * side / 2 + 0.5, 0, 1)[..., None]
    stripe = (0.5 + 0.5 * np.sin(actor["stripes"] * u))[..., None]
    if "drift" in pose:
        shade = np.sin(pose["wave_x"] * axis[None, None, :] + pose["wave_y"] * axis[None, :, None] - pose["drift"])
    else:
        shade = np.clip(axis[None, :] * actor["slope"][0] + axis[:, None] * actor["slope"][1], -1, 1)
    shade = 0.5 + 0.5 * shade[..., None]
    looks = actor["colours"][0] * stripe + actor["colours"][1] * (1 - stripe)
    behind = actor["background"][0] * shade + actor["background"][1] * (1 - shade)
    return (255 * (inside * looks + (1 - inside) * behind)).astype(np.uint8)
