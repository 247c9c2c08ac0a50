"""The settings of a run as dataclasses, which define the keys of YAML files and of the command line."""

import dataclasses
import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from tclr_kernels import info

from . import annotations, checkpoint, models, processes, train, videos

DataSet = Literal["ucf101", "hmdb51", "kinetics400", "diving48", "folder"]


@dataclass(frozen=True)
class Data:
    """The data set. `train` and `test` name its parts; size = [H, W] resizes all videos to one size."""

    dataset: DataSet = "ucf101"
    root: str = "."
    split: int = 1
    train: str = "train"
    test: str = "test"
    size: list[int] | None = None


@dataclass(frozen=True)
class OtherData:
    """Another data set for an evaluation. A setting that is None is that of the data of the pretraining."""

    dataset: DataSet | None = None
    root: str | None = None
    split: int | None = None
    train: str | None = None
    test: str | None = None
    size: list[int] | None = None


@dataclass(frozen=True)
class Net:
    """The backbone, the number of channels of its first stage, and the size of an embedding."""

    backbone: Literal["tiny", "r3d18", "r2plus1d18", "c3d"] = "r3d18"
    width: int = 64
    dim: int = 128


@dataclass(frozen=True)
class Evaluation:
    """The evenly spaced clips of a video for an evaluation. pooled: average the features over the time of a clip."""

    clips: int = 10
    frames: int = 16
    stride: int = 2
    side: int = 112
    pooled: bool = False


def digest(*values, digits=8):
    """A hash of these values, as hexadecimal digits."""
    plain = [dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for value in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:digits]


def write(path, values):
    """Prints the resolved configuration and writes it to a file. values: {name: dataclass or plain value}"""
    plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}
    text = yaml.safe_dump(plain, sort_keys=False)
    print(text, end="", flush=True)
    with checkpoint.whole(path) as file:
        file.write(text.encode())


def write_environment(path, device):
    """Writes the environment of a run: versions, machine and time."""
    facts = {name: version for name, version in info.versions().items() if version}
    facts |= dict(cpu=info.cpu_model(), threads=torch.get_num_threads())
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    facts["started"] = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    with checkpoint.whole(path) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")


def saved_settings(run):
    """The settings in the config.yaml of a pretraining: {name: {key: value}}."""
    path = Path(run) / "config.yaml"
    plain = yaml.safe_load(path.read_text()) if path.exists() else {}
    return {name: values for name, values in plain.items() if isinstance(values, dict)}


def read_run(run):
    """(net, data) from the config.yaml of a pretraining."""
    path = Path(run) / "config.yaml"

    def text():
        if not path.exists():
            raise SystemExit(f"run: found no {path}, wanted the folder of a pretraining")
        return path.read_text()

    plain = yaml.safe_load(processes.from_first(text))
    return Net(**plain["net"]), Data(**plain["data"])


def data_of(run, other=None):
    """The data of a pretraining, with the settings that `other` changes."""
    given = dataclasses.asdict(other) if other else {}
    return dataclasses.replace(read_run(run)[1], **{k: v for k, v in given.items() if v is not None})


def open_videos(data, part, shortest, out=None, seed=0, classes=None):
    """The videos of one part. Unreadable ones are replaced, and listed in `out`/bad_videos.csv.

    All processes call this together, and the first one writes the list. Labels are indices of the classes of the
    training part, or of `classes` if given. Raises ValueError, naming two videos, if videos differ in size and
    `data.size` is not given.
    """
    if data.size is not None and (len(data.size) != 2 or min(data.size) < 1):
        raise ValueError(f"data.size: found {data.size}, wanted [H, W] of at least 1")
    names_classes = part if classes else data.train
    with processes.telling():
        listing = annotations.read(data.dataset, data.root, part, data.split, train=names_classes, classes=classes)
    processes.say(f"{data.dataset}, {part}: " + ", ".join(f"{n} {what}" for what, n in listing.counts.items()))
    size = tuple(data.size) if data.size else None
    bad = out / "bad_videos.csv" if out and processes.rank() == 0 else None
    found = videos.Files(listing, shortest=shortest, size=size, seed=seed, bad_videos=bad)
    digest = train.listing_digest(found)[:8]
    processes.same(**{f"data, {part}": f"{len(found)} videos, {digest}"}, decoder=found.decoder)
    if size is None:
        videos.check_sizes(found)
    return found


def open_labelled(data, part, shortest, out=None, classes=None):
    """The videos of one part. Raises ValueError if they have no classes."""
    found = open_videos(data, part, shortest, out, classes=classes)
    if found.labels is None:
        raise ValueError(f"data: found videos without classes in {data.root}, part {part!r}, wanted <class>/<file>")
    return found


def build(net, seed):
    """A new embedder, whose weights depend on the seed only."""
    torch.manual_seed(seed)
    return train.Embedder(models.backbone(net.backbone, net.width), net.dim).to(memory_format=torch.channels_last_3d)


def check(evaluation, share=1.0, **counts):
    """Raises ValueError, naming the setting, for a share outside of (0, 1] and for counts below 1."""
    if not 0 < share <= 1:
        raise ValueError(f"share: found {share}, wanted a number above 0 and at most 1")
    counts |= {f"evaluation.{name}": value for name, value in vars(evaluation).items() if name != "pooled"}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: found {value}, wanted at least 1")


def usable(name):
    """Raises ValueError if this is not the name of a device, or if the device is a GPU and there is none."""
    try:
        kind = "cpu" if name == "auto" else torch.device(name).type
    except RuntimeError:
        raise ValueError(f"device: found {name!r}, wanted auto, cpu, cuda or a single GPU such as cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: found {name!r}, wanted cpu or auto: PyTorch finds no GPU here")


def device(name):
    """The device of this process. "auto" is a GPU if there is one. Several processes must not share a GPU."""
    with processes.telling():
        usable(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and processes.ranks() > 1:
            name = processes.gpu()
    processes.same(device=torch.device(name).type)
    if torch.device(name).type == "cuda" and processes.ranks() > 1:
        processes.one_gpu_each(name)
        torch.cuda.set_device(name)
    return name
