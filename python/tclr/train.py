"""Pretraining without labels: the paper's algorithm.

What a step draws (its videos, windows and augmentations) is a function of the seed and of the step's number alone: a
run that goes on from a checkpoint, in the middle of an epoch too, draws what the uninterrupted one would have.
"""

import dataclasses
import hashlib
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import distributed, nn

import tclr_kernels as tk
from tclr_kernels import backends
from tclr_kernels.losses import FORMS

from . import checkpoint
from .augment import Augment, ReleaseAugment
from .clips import ClipPlan, random_windows
from .models import Projector

IC_ONLY = dict(ic_global=1.0, ll=0.0, gl=0.0)
AUGMENTS = {"demo": Augment, "release": ReleaseAugment}
AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a checkpoint's state, or the meaning of its number of steps, hangs on: the rest may change as a run goes on.
FIXED = "net.", "clips.", "data.dataset", "data.split", "data.train", "recipe.optimizer", "recipe.batch"
FIXED += "recipe.accumulate", "recipe.learn_temperature", "recipe.queue", "recipe.seed"
# of checkpoints that were written before these settings
EARLIER = {"clips.windows": "same", "clips.decay": None, "recipe.queue": 0}
OBJECTIVE = "recipe.weights", "recipe.form", "recipe.temperature"
LEAST = dict(steps=0, epochs=0, batch=1, accumulate=1, lr=0, warmup=0, weight_decay=0, side=1, readers=0)
LEAST |= dict(checkpoint_every=1, queue=0)
WARM = 0.01, 0.05, 0.1, 0.5, 1.0  # the release's factors of the learning rate, an epoch each


@dataclass(frozen=True)
class Recipe:
    """How to pretrain; `weights` are those of `tclr_kernels.tclr`, `form` too.

    steps: how many, or 0 for `epochs` times the steps of an epoch. schedule: "cosine" warms up over `warmup` steps;
    "plateau" is the release's, five epochs of warm-up, then a tenth after 9 epochs without a new best mean loss.
    accumulate: batches a step, each contrasted within itself. learn_temperature: `temperature` is where it starts.
    queue: how many embeddings of earlier global clips are further negatives of ic_global; each process keeps its own.
    readers: threads that decode the next batch while one is trained on; 0 for videos in memory.
    """

    steps: int = 150
    epochs: int = 0
    batch: int = 64
    accumulate: int = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 2e-3
    schedule: Literal["cosine", "plateau"] = "cosine"
    warmup: int = 10
    weight_decay: float = 1e-4
    temperature: float = 0.1
    learn_temperature: bool = False
    weights: dict[str, float] | None = None
    form: Literal["paper", "release"] = "paper"
    queue: int = 0
    backend: str | None = None
    augment: Literal["demo", "release"] = "demo"
    side: int = 32
    amp: Literal["off", "fp16", "bf16"] = "off"
    compile: bool = False
    readers: int = 0
    checkpoint_every: int = 100
    seed: int = 0


class Embedder(nn.Module):
    """Backbone and shared head: clips [N, F, 3, H, W] -> time-pooled [N, D] and, on demand, time slices [N, T, D]."""

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.head = Projector(backbone.features, dim)

    def forward(self, clips):
        slices = self.backbone(clips).transpose(1, 2)
        return self.head(slices.mean(1)), slices


def pretrain(embedder, videos, plan: ClipPlan, recipe: Recipe, record, progress=iter, *, file=None, device="cpu"):
    """Trains `embedder` in place. videos: the protocol of videos.py; record(step=, total=, ...) follows each step.

    file: the checkpoint, read if it is there and written every `checkpoint_every` steps, at the end and on SIGTERM,
    after which the process exits with 143; of several processes, the first writes and all read. A setting that differs
    from the checkpoint's is applied, or refused by a ValueError that names it. A loss that is not finite raises
    FloatingPointError with the videos' names.
    """
    run = Run(embedder, videos, plan, recipe, device)
    if file and file.exists():
        run.restore(checkpoint.load(file))
    carry_on(run, record, progress, file=file)


def carry_on(run, record, progress=iter, *, file=None):
    """Takes the steps that are left of a run, as `pretrain` describes."""
    run.embedder.train()
    with checkpoint.StopRequest() if file else nullcontext(False) as stop:
        for step in progress(range(run.done, run.steps)):
            record(step=step, **run.step())
            finished = run.done == run.steps
            if file and rank() == 0 and (stop or finished or run.done % run.recipe.checkpoint_every == 0):
                checkpoint.save(file, **run.state())
            if stop:
                raise SystemExit(checkpoint.STOPPED)
    run.embedder.eval()


class Run:
    """A pretraining at some step: everything that a checkpoint holds; `more` are settings to keep, such as net=Net()"""

    def __init__(self, embedder, videos, plan, recipe, device, **more):
        check(recipe, plan, device)
        self.embedder, self.videos, self.device = embedder.to(device), videos, device
        self.plan, self.recipe = plan, recipe
        self.settings = {name: dataclasses.asdict(each) for name, each in dict(more, clips=plan, recipe=recipe).items()}
        self.epoch_steps, self.steps = length(recipe, videos)
        self.done = 0
        self.ahead = Ahead(recipe.readers) if recipe.readers else None
        temperature = nn.Parameter(torch.tensor(recipe.temperature)) if recipe.learn_temperature else recipe.temperature
        settings = dict(form=recipe.form, weights=recipe.weights, backend=recipe.backend)
        self.queue = None
        if recipe.queue:
            settings["weights"] = {**(recipe.weights or {}), "ic_global": 0.0}  # `objective` adds that term
            dim = embedder.head[-1].num_features
            self.queue = tk.NegativeQueue(recipe.queue, dim).to(device)
            self.queue.enqueue(torch.randn(recipe.queue, dim, generator=drawn(recipe.seed, "queue")).to(device))
        self.loss = tk.TCLRLoss(temperature=temperature, **settings).to(device)
        self.parameters = [*embedder.parameters(), *self.loss.parameters()]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
        self.optimizer = kind(self.parameters, recipe.lr, weight_decay=recipe.weight_decay)
        self.plateau = Plateau()
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.amp == "fp16")
        self.local = any(weight for name, weight in weights(recipe).items() if name != "ic_global")
        self.embed = torch.compile(embed) if recipe.compile else embed

    def step(self):
        """One step of the optimizer; returns the terms, averaged over its batches."""
        self.optimizer.param_groups[0]["lr"] = self.recipe.lr * self.factor()
        self.optimizer.zero_grad()
        sums = Counter()
        for part in range(self.recipe.accumulate):
            terms = self.backward(part)
            for name, term in terms._asdict().items():
                sums[name] += term.item() / self.recipe.accumulate
        self.scaler.unscale_(self.optimizer)
        average_gradients(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.recipe.learn_temperature:
            self.loss.temperature.data.clamp_(min=0.01)
            sums["temperature"] = self.loss.temperature.item()
        self.plateau.add(sums["total"])
        self.done += 1
        if self.done % self.epoch_steps == 0:
            self.plateau.end_epoch(counts=self.done // self.epoch_steps > len(WARM))
        return dict(sums)

    def backward(self, part):
        """The terms of one batch, their gradients added to what is there."""
        recipe = self.recipe
        if self.ahead:
            following = divmod(self.done * recipe.accumulate + part + 1, recipe.accumulate)
            following = following if following[0] < self.steps else None
            chosen, windows, generator = self.ahead.take(self.read, (self.done, part), following)
        else:
            chosen, windows, generator = self.read(self.done, part)
        windows = windows.to(self.device)
        augment = AUGMENTS[recipe.augment](recipe.side, generator)
        with torch.autocast(torch.device(self.device).type, AMP.get(recipe.amp), enabled=recipe.amp != "off"):
            g, s, x = self.embed(self.embedder, windows, self.plan, augment, local=self.local)
        terms = self.objective(g.float(), s.float(), x.float())
        if not math.isfinite(terms.total.item()):
            names = ", ".join(self.videos.names[i] for i in chosen)
            raise FloatingPointError(f"step {self.done}: the loss is {terms.total.item()}; its batch: {names}")
        self.scaler.scale(terms.total / recipe.accumulate).backward()
        return terms

    def objective(self, g, s, x):
        """The terms of a batch; with a queue, ic_global has the earlier global clips as further negatives."""
        terms = self.loss(g, s, x)
        if self.queue is None:
            return terms
        ic = tk.nt_xent(*g, self.loss.temperature, negatives=self.queue, backend=self.recipe.backend)
        self.queue.enqueue(g)
        weight = (self.recipe.weights or {}).get("ic_global", 1.0)
        return terms._replace(total=terms.total + weight * ic, ic_global=ic)

    def read(self, step, part, threads=None):
        """A batch's videos, its windows, and the generator that draws its augmentations."""
        generator = drawn(self.recipe.seed, "step", step, part, rank())
        chosen = self.batch(step, part)
        return chosen, random_windows(self.videos, chosen, self.plan, generator, threads), generator

    def batch(self, step, part):
        """The videos of a batch: an epoch's random order, cut; its remainder is left out, and each rank has a share."""
        recipe = self.recipe
        epoch, within = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.videos), generator=drawn(recipe.seed, "epoch", epoch))
        start = (within * recipe.accumulate + part) * recipe.batch
        return order[start : start + recipe.batch].tolist()[rank() :: ranks()]

    def factor(self):
        """Of the learning rate, at this step."""
        if self.recipe.schedule == "cosine":
            return warm_cosine(self.done, self.recipe.warmup, self.steps)
        epoch = self.done // self.epoch_steps
        return WARM[epoch] if epoch < len(WARM) else self.plateau.factor

    def state(self):
        parts = self.embedder, self.loss, self.optimizer, self.scaler
        names = "embedder", "loss", "optimizer", "scaler"
        states = {name: part.state_dict() for name, part in zip(names, parts, strict=True)}
        states |= {"queue": self.queue.state_dict()} if self.queue else {}
        kept = dict(settings=self.settings, videos=listing_digest(self.videos), classes=self.videos.classes)
        return dict(done=self.done, plateau=vars(self.plateau).copy(), **kept, **states)

    def restore(self, state):
        """Takes a checkpoint's state under the settings of now; one that cannot be applied is a ValueError by name."""
        settings = state.get("settings", {})
        self.refuse(settings, state)
        self.done = state["done"]
        try:
            self.embedder.load_state_dict(state["embedder"])
        except RuntimeError as error:
            raise ValueError(f"net: found another network than the checkpoint's: {error}") from None
        if self.recipe.learn_temperature:
            self.loss.load_state_dict(state["loss"])
        if self.queue:
            self.queue.load_state_dict(state["queue"])
        now = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, now, strict=True):
            group.update(given)  # load_state_dict brings the checkpoint's weight decay back
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        vars(self.plateau).update(state["plateau"])
        before, now = flat(settings), flat(self.settings)
        if any(before.get(name, now[name]) != now[name] for name in OBJECTIVE):
            self.plateau.restart()

    def refuse(self, settings, state):
        """Raises ValueError that names every setting that differs from the checkpoint's and cannot change."""
        before, now = EARLIER | flat(settings), flat(self.settings)
        fixed = FIXED + ("recipe.temperature",) * self.recipe.learn_temperature
        names = [name for name in before.keys() & now.keys() if before[name] != now[name] and name.startswith(fixed)]
        found = [f"{name}: found {now[name]!r}, wanted {before[name]!r}" for name in sorted(names)]
        if not found and state.get("videos", listing_digest(self.videos)) != listing_digest(self.videos):
            found = [f"data: found {len(self.videos)} videos that are not those of the checkpoint, or not in its order"]
        if not found and state["done"] > self.steps:
            found = [f"recipe.steps: found {self.steps}, wanted at least the {state['done']} that are done"]
        if found:
            raise ValueError("; ".join(found) + ", to go on from the checkpoint: a changed one needs a new run")


@dataclass
class Plateau:
    """A tenth of the learning rate after `patience` epochs without a new best mean loss."""

    patience: int = 9
    factor: float = 1.0
    best: float = math.inf
    stale: int = 0
    losses: list = field(default_factory=list)

    def add(self, loss):
        self.losses.append(loss)

    def restart(self):
        """Forgets the losses there were, which those of another objective cannot be compared with."""
        self.best, self.stale, self.losses = math.inf, 0, []

    def end_epoch(self, counts):
        """`counts` is False during the warm-up, whose epochs are remembered but not held against the rate."""
        mean, self.losses = sum(self.losses) / len(self.losses), []
        self.stale = 0 if mean < self.best or not counts else self.stale + 1
        self.best = min(self.best, mean)
        if self.stale == self.patience:
            self.factor, self.stale = self.factor / 10, 0


class Ahead:
    """Reads the batch that follows while one is trained on."""

    def __init__(self, readers):
        self.one, self.readers, self.coming = ThreadPoolExecutor(1), ThreadPoolExecutor(readers), {}

    def take(self, read, this, following):
        """read(*this, threads), begun at the call before; begins read(*following, threads)."""
        found = self.coming.pop(this, None) or self.one.submit(read, *this, self.readers)
        if following:
            self.coming[following] = self.one.submit(read, *following, self.readers)
        return found.result()


def check(recipe, plan, device):
    """Raises ValueError, or RuntimeError for a backend that does not serve the device, that names a key of the recipe.

    Found out here, before a run's folder is touched, and not at the first step.
    """
    for name, least in LEAST.items():
        if not getattr(recipe, name) >= least:  # so that NaN is refused too
            raise ValueError(f"recipe.{name}: found {getattr(recipe, name)}, wanted at least {least}")
    aligned = {name: value for name, value in weights(recipe).items() if name in ("ll", "gl")}
    if plan.windows == "independent" and any(aligned.values()):
        found = ", ".join(f"{name} {weight}" for name, weight in aligned.items())
        raise ValueError(
            f"recipe.weights: found {found} beside clips.windows 'independent', wanted 0 for both: "
            "they compare clips of the same frames"
        )
    backends.choose(recipe.backend, torch.device(device))


def weights(recipe):
    """The weight of each term, those that the recipe leaves to its form's defaults too."""
    return FORMS.get(recipe.form, {}) | (recipe.weights or {})


def flat(settings):
    """{"recipe.lr": 1e-3, ...} of {"recipe": {"lr": 1e-3, ...}, ...}"""
    return {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}


def listing_digest(videos):
    """Stands for which videos there are, their labels and their order, on which what a step draws depends."""
    listed = [dataclasses.astuple(entry) for entry in getattr(videos, "entries", [])] or list(videos.names)
    return hashlib.sha256(repr((listed, videos.classes)).encode()).hexdigest()


def length(recipe, videos):
    """Steps of an epoch, and of the whole pretraining."""
    epoch = len(videos) // (recipe.batch * recipe.accumulate)
    if epoch == 0:
        wanted = f"wanted at most the {len(videos)} videos there are"
        raise ValueError(f"batch: found {recipe.batch} x {recipe.accumulate} a step, {wanted}")
    return epoch, recipe.steps or recipe.epochs * epoch


def drawn(seed, *what):
    """A generator of random numbers that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def embed(embedder, windows, plan, augment, *, local=True):
    """Two views of each video: g: [2, B, D] global clips; s: [2, B, T, D] their slices; x: [2, B, T, D] local clips.

    windows: uint8, as `random_windows` gives them: [B, window, 3, H, W], of which two augmentations are the two views,
    or, where plan.windows is "independent", [2 B, ...], each view's own. Without `local`, s and x are stand-ins for
    losses that do not read them.
    """
    B, T = len(windows) // plan.windows_drawn, plan.local_clips
    views = 2 // plan.windows_drawn
    whole, chunks = plan.cut(windows)
    g, slices = embedder(augment(whole, views=views))
    g = g.unflatten(0, (2, B))
    if not local:
        unread = g.detach()[:, :, None].expand(-1, -1, T, -1)
        return g, unread, unread
    s = embedder.head(slices).unflatten(0, (2, B))
    x, _ = embedder(augment(chunks, views=views))
    return g, s, x.unflatten(0, (2, B, T))


def warm_cosine(step, warmup, steps):
    """The learning rate's factor: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def rank():
    return int(os.environ.get("RANK", 0))


def ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def average_gradients(parameters):
    """The mean over all processes of `torchrun`, in one transfer; each process contrasts its own share of the batch."""
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= ranks()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
