"""UCF101's lists and the decoding of their files into memory."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter


@dataclass
class VideoSet:
    """Decoded videos. frames: a list of uint8 [F, 3, H, W]; labels: [videos]; counts: how the decoding went."""

    names: list
    frames: list
    labels: torch.Tensor
    counts: Counter = field(default_factory=Counter)

    def __len__(self):
        return len(self.names)

    def length(self, i):
        return len(self.frames[i])

    def read(self, i, positions):
        return self.frames[i][positions]


def ucf101_list(root, split):
    """[(file below UCF-101/, label from 0), ...] of a list such as "trainlist01"; the class is the folder's name."""
    lists = Path(root) / "ucfTrainTestlist"
    lines = (lists / "classInd.txt").read_text().split("\n")
    labels = {name: int(number) - 1 for number, name in (line.split() for line in lines if line.strip())}
    files = [line.split()[0] for line in (lists / f"{split}.txt").read_text().split("\n") if line.strip()]
    return [(file, labels[file.split("/")[0]]) for file in files]


def decode(path):
    """Every frame of a file, whatever its container claims: uint8 [F, 3, H, W]

    One thread: on small frames, handing rows out to threads takes 20 times as long as converting them.
    """
    convert = VideoReformatter()
    with av.open(str(path)) as container:
        frames = [convert.reformat(f, format="rgb24", threads=1).to_ndarray() for f in container.decode(video=0)]
    if not frames:
        raise ValueError(f"{path}: no frame could be decoded")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def mirror_pad(video, length):
    """Plays a short video forwards, backwards, forwards, ... up to `length` frames. video: [F, 3, H, W]"""
    there_and_back = torch.tensor([*range(len(video)), *range(len(video) - 2, 0, -1)])
    return video[there_and_back[torch.arange(length) % len(there_and_back)]]


def load(root, split, shortest, progress=iter):
    """Decodes a split. Videos under `shortest` frames are mirror-padded, unreadable ones left out; both are counted."""
    videos, names, labels, counts = [], [], [], Counter()
    for name, label in progress(ucf101_list(root, split)):
        try:
            video = decode(Path(root) / "UCF-101" / name)
        except (OSError, av.FFmpegError, ValueError) as error:
            counts["unreadable"] += 1
            print(f"left out {name}: {error}")
            continue
        if len(video) < shortest:
            counts["padded"] += 1
            video = mirror_pad(video, shortest)
        counts["decoded"] += 1
        names.append(name)
        videos.append(video)
        labels.append(label)
    if not videos:
        raise ValueError(f"{root}: no video of {split} could be decoded")
    return VideoSet(names, videos, torch.tensor(labels), counts)
