"""The command line `tclr <command>`. Each command is a function in this module with the same arguments."""

import csv
import dataclasses
import json
import os
import sys
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tclr_kernels

from . import ablation, checkpoint, config, dryrun, evaluate, models, processes, report, train
from . import finetune as tuning
from . import linear as probe
from . import page as pages
from .clips import ClipPlan
from .config import Data, DataSet, Evaluation, Net, OtherData
from .features import embedder_of, features
from .options import Parser

KS = 1, 5, 10, 20
DESCRIPTION = """Self-supervised pretraining of video networks by TCLR, and its evaluations. A pretraining writes a
folder, RUN; the other commands read it and add their results. --dry-run tries a command on a small scale."""


def pretrain(
    out: Path,
    data: Data,
    net: Net = Net(),  # noqa: B008
    clips: ClipPlan = ClipPlan(),  # noqa: B008
    recipe: train.Recipe = train.Recipe(),  # noqa: B008
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    timeout: float = processes.TIMEOUT,
):
    """Pretrains a network without labels.

    Writes config.yaml, last.pt, metrics.jsonl and TensorBoard's events to `out`.

    Under torchrun, each process takes a share of every batch, and the losses compare the rows of the whole batch. A run
    that torchrun restarts continues from last.pt. timeout: seconds after which a process stops waiting for the others.
    """
    with processes.group(timeout):
        job = processes.Job(out)
        if (stage := job.stage()) == "claimed":
            resume, overwrite = True, False
        elif stage == "claiming":  # this job's own start was cut off: what it left in the folder may be overwritten
            overwrite = not resume
        elif stage == "finished":
            processes.say(f"{out}: this run was finished before the restart")
            return
        processes.same(overwrite=overwrite, resume=resume)
        first, device, last = processes.rank() == 0, config.device(device), out / "last.pt"
        with processes.together():
            checkpoint.vacant(out, resume=resume, overwrite=overwrite)
        videos = config.open_videos(data, data.train, clips.window, out, recipe.seed)
        run = train.Run(config.build(net, recipe.seed), videos, clips, recipe, device, net=net, data=data)
        with processes.together():  # no process changes the folder before all have read the checkpoint
            if resume:
                restore(run, last)
        log, settings = Log(out if first else None, recipe, run.steps, run.done), dict(data=data, net=net, clips=clips)
        with ExitStack() as stack:
            with processes.together():
                if first:
                    stack.enter_context(checkpoint.alone(out))
            with processes.together():
                if first:
                    job.note("claiming")
                    checkpoint.claim(out, resume=resume, overwrite=overwrite)
                if overwrite:
                    last.unlink(missing_ok=True)  # in every process, since machines may have separate disks
                if first:
                    config.write(out / "config.yaml", dict(**settings, recipe=recipe, **train.where(device)))
                    config.write_environment(out / "environment.json", device)
                stack.enter_context(log)
            job.note("claimed")
            train.carry_on(run, log, file=last)
            with processes.together():
                stack.close()
        job.note("finished")
        counts = videos.tally()
        listed = "; bad_videos.csv lists the unreadable ones" * ("unreadable" in counts)
        listed += "; `tclr data check` lists the missing ones" * ("missing" in counts)
        processes.say("reading: " + ", ".join(f"{count} {what}" for what, count in counts.items()) + listed)


def restore(run, file):
    state = checkpoint.newest(file)
    if state is None:
        return
    if "done" not in state:
        raise SystemExit(f"{file} holds weights alone: wanted the checkpoint of a pretraining to resume")
    if "settings" not in state:  # earlier versions stored them in config.yaml only
        state["settings"] = processes.from_first(lambda: config.saved_settings(file.parent))
    run.restore(state)


class Log:
    """Writes metrics.jsonl and TensorBoard events, and shows a progress bar and, every few seconds, the terms."""

    def __init__(self, out, recipe, steps, done=0):
        self.out, self.each, self.steps, self.done, self.told = out, recipe.batch * recipe.accumulate, steps, done, None

    def __enter__(self):
        if self.out:
            from torch.utils.tensorboard import SummaryWriter

            path, done = self.out / "metrics.jsonl", self.done
            kept = path.read_text().splitlines()[:done] if path.exists() else []  # later steps will be repeated
            with checkpoint.whole(path) as file:
                file.write("".join(line + "\n" for line in kept).encode())
            self.file, self.board = path.open("a"), SummaryWriter(self.out / "tensorboard", purge_step=done)
            columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[pace]}"), TimeRemainingColumn()
            self.bar = Progress(*columns, speed_estimate_period=300)
            self.bar.add_task("", total=self.steps, completed=done, pace="")
            self.bar.start()
        return self

    def __exit__(self, failed, *_):
        if self.out:
            self.bar.stop()
            with suppress(OSError) if failed else nullcontext():  # the first error says more
                self.file.close()
                self.board.close()

    def __call__(self, step, **terms):
        if not self.out:
            return
        self.file.write(json.dumps(dict(step=step, **terms)) + "\n")
        self.file.flush()
        for name, value in terms.items():
            self.board.add_scalar(name, value, step)
        task = self.bar.tasks[0]
        pace = f"{self.each * task.speed:.1f} videos/s" if task.speed else ""
        self.bar.update(task.id, completed=step + 1, pace=pace)
        now = time.monotonic()
        if self.told is None or now - self.told > 10:
            self.told = now
            left = f"{timedelta(seconds=round(task.time_remaining))} left" if task.time_remaining else ""
            shown = *(f"{name} {value:.4g}" for name, value in terms.items()), pace, left
            self.bar.console.print(f"step {step}: " + ", ".join(filter(None, shown)), highlight=False, soft_wrap=True)


def retrieval(run: Path, evaluation: Evaluation = Evaluation(), data: OtherData | None = None, device: str = "auto",  # noqa: B008
              timeout: float = processes.TIMEOUT):  # fmt: skip
    """Finds the training videos most like each test video: R@1, R@5, R@10, R@20 and a picture."""

    def measured(gallery, queries):
        ranks = evaluate.ranking(gallery.clips, queries.clips, evaluation.clips)
        figures = {f"r{k}": evaluate.recall(ranks, gallery.labels, queries.labels, k) for k in KS}
        chosen = torch.linspace(0, len(queries.labels) - 1, min(8, len(queries.labels))).long().tolist()
        result(run, "retrieval", gallery.hash, figures)  # before the picture, so that an error there loses nothing
        report.plot_gallery(queries.videos, gallery.videos, ranks, chosen, run / "gallery.png")
        return figures

    return of_features(run, data, evaluation, device, timeout, measured)


def linear(run: Path, evaluation: Evaluation = Evaluation(), data: OtherData | None = None, device: str = "auto",  # noqa: B008
           share: float = 1.0, seed: int = 0, timeout: float = processes.TIMEOUT):  # fmt: skip
    """Trains one linear layer on the features of the frozen network, and measures its accuracy."""
    config.check(evaluation, share=share)

    def measured(gallery, queries):
        layer = fitted(gallery, share, seed)
        figures = dict(accuracy=probe.accuracy(layer, queries.clips, queries.labels, evaluation.clips), share=share)
        name = "linear" if share == 1 else f"linear-{share:g}"
        tuning.save(run / f"{name}.pt", layer, gallery.videos.classes, evaluation, backbone=gallery.weights)
        return result(run, name, gallery.hash, figures)

    return of_features(run, data, evaluation, device, timeout, measured)


def multiclip(run: Path, evaluation: Evaluation = Evaluation(), data: OtherData | None = None, device: str = "auto",  # noqa: B008
              timeout: float = processes.TIMEOUT):  # fmt: skip
    """Measures retrieval and linear accuracy against the number of clips per video."""

    def measured(gallery, queries):
        layer, curve = fitted(gallery), {}
        for clips in range(1, evaluation.clips + 1):
            ranks = evaluate.ranking(gallery.clips, queries.clips, clips)
            curve[clips] = dict(
                r1=evaluate.recall(ranks, gallery.labels, queries.labels, 1),
                linear=probe.accuracy(layer, queries.clips, queries.labels, clips),
            )
        result(run, "multiclip", gallery.hash, dict(by_clips=curve))
        report.plot_curves(curve, run / "multiclip.png")
        return dict(by_clips=curve)

    return of_features(run, data, evaluation, device, timeout, measured)


def confusion(run: Path, evaluation: Evaluation = Evaluation(), data: OtherData | None = None, device: str = "auto",  # noqa: B008
              classes: list[str] | None = None, timeout: float = processes.TIMEOUT):  # fmt: skip
    """Draws the confusion matrix of the linear layer."""

    def measured(gallery, queries):
        names = gallery.videos.classes
        unknown = sorted(set(classes or []) - set(names))
        if unknown:
            raise SystemExit(f"classes: found {', '.join(unknown)}, wanted some of {', '.join(names)}")
        found = probe.predictions(fitted(gallery), queries.clips, evaluation.clips)
        counts = torch.zeros(len(names), len(names), dtype=torch.long)
        counts.index_put_((queries.labels, found), torch.tensor(1), accumulate=True)
        chosen = [names.index(name) for name in classes or names]
        result(run, "confusion", gallery.hash, dict(classes=names, counts=counts.tolist()))
        report.plot_confusion(counts[chosen][:, chosen], [names[i] for i in chosen], run / "confusion.png")
        return dict(classes=names, counts=counts.tolist())

    return of_features(run, data, evaluation, device, timeout, measured)


@processes.single("finetune")
def finetune(run: Path, evaluation: Evaluation = Evaluation(), data: OtherData | None = None, device: str = "auto",  # noqa: B008
             share: float = 1.0, epochs: int = 16, batch: int = 16, lr: float = 1e-4, seed: int = 0):  # fmt: skip
    """Trains the whole network with a classifier on the labels, and measures its accuracy."""
    config.check(evaluation, share=share, epochs=epochs, batch=batch)
    data, device = config.data_of(run, data), config.device(device)
    span = (evaluation.frames - 1) * evaluation.stride + 1
    trained, test = (config.open_labelled(data, part, span, run) for part in (data.train, data.test))
    torch.manual_seed(seed)
    model = tuning.Classifier(embedder_of(run).backbone, len(trained.classes))
    losses = []
    settings = dict(epochs=epochs, batch=batch, lr=lr, seed=seed)
    chosen = tuning.subset(trained.labels, share, seed)

    def record(epoch, loss):
        losses.append(loss)
        print(f"epoch {epoch + 1} of {epochs}: loss {loss:.4g}", flush=True)

    tuning.finetune(model, trained, chosen, evaluation, **settings, device=device, record=record)
    name = "finetune" if share == 1 else f"finetune-{share:g}"
    tuning.save(run / f"{name}.pt", model, trained.classes, evaluation)
    figures = dict(accuracy=tuning.accuracy(model, test, evaluation, device), share=share, losses=losses, **settings)
    return result(run, name, config.digest(data, evaluation, share, settings), figures)


@processes.single("classify")
def classify(run: Path, classifier: str = "finetune", data: OtherData | None = None, device: str = "auto"):
    """Measures a classifier of `finetune` or `linear` on the run's test videos or on another data set.

    classifier: the name of its file without .pt, such as linear-0.1. Labels are the names of the classes that it was
    trained with; a video of any other class is an error. The clips are those of the evaluation that made it.
    """
    data, device = config.data_of(run, data), config.device(device)
    file = run / f"{classifier}.pt"
    if not file.exists():
        raise SystemExit(f"classifier: found no {file}, wanted a classifier that finetune or linear left there")
    state = checkpoint.load(file)
    if "evaluation" not in state:
        raise SystemExit(f"classifier: found another kind of checkpoint in {file}, wanted one of finetune or linear")
    e, embedder, classes = Evaluation(**state["evaluation"]), embedder_of(run), state["classes"]
    if "backbone" in state:
        queries = features(run, embedder, data, data.test, e, device, classes)
        if state["backbone"] != queries.weights:
            raise SystemExit(f"{file} was fitted on other weights than those of {run / 'last.pt'}: run linear again")
        layer = torch.nn.Linear(queries.clips.shape[2], len(classes))
        layer.load_state_dict(state["model"])
        accuracy = probe.accuracy(layer, queries.clips, queries.labels, e.clips)
    else:
        videos = config.open_labelled(data, data.test, (e.frames - 1) * e.stride + 1, run, classes)
        model = tuning.Classifier(embedder.backbone, len(classes))
        model.load_state_dict(state["model"])
        accuracy = tuning.accuracy(model.to(device).eval(), videos, e, device)
    return result(run, f"classify-{classifier}", config.digest(data, e, classifier), dict(accuracy=accuracy))


@processes.single("export")
def export(run: Path, file: Path, format: Literal["torch", "safetensors"] = "safetensors"):
    """Writes the weights of the backbone, under torchvision's names."""
    weights = {name: value.contiguous() for name, value in embedder_of(run).backbone.state_dict().items()}
    with checkpoint.whole(file) as opened:
        if format == "torch":
            torch.save(weights, opened)
        else:
            from safetensors.torch import save

            opened.write(save(weights))
    print(f"{len(weights)} tensors to {file}")


@processes.single("load")
def load(
    out: Path,
    file: Path,
    format: Literal["release", "torchvision"],
    data: Data,
    net: Net = Net(),  # noqa: B008
    overwrite: bool = False,
):
    """Creates a run's folder from a checkpoint of the official code or of torchvision."""
    embedder = config.build(net, seed=0)
    if format == "release":
        missing = models.load_release(embedder, file)
    else:
        missing = models.load_torchvision(embedder.backbone, file)
    checkpoint.claim(out, resume=False, overwrite=overwrite)
    config.write(out / "config.yaml", dict(data=data, net=net, weights=str(file)))
    checkpoint.save(out / "last.pt", embedder=embedder.state_dict(), settings=dict(net=dataclasses.asdict(net)))
    print(f"{file} to {out}" + f"; not in it, so initialised at random: {', '.join(missing)}" * bool(missing))


@processes.single("report")
def page(run: Path):
    """Writes report.html: results, curves, pictures and settings of a run, in one file."""
    print(report.shown(str(pages.write(run))))


@processes.single("data check")
def check(dataset: DataSet, root: Path, part: str = "train", split: int = 1, out: Path = Path("data_check.csv"),  # noqa: B008
          window: int = 64):  # fmt: skip
    """Lists missing, unreadable and short videos, and those of another size. Exits with 1 if one cannot be read."""
    from . import check

    check.main(dataset, root, part, split, out=out, window=window)


def of_features(run, data, evaluation, device, timeout, measured):
    """Calls measured(features of the training part, features of the test part), for the run's data or for other data.

    Several processes share the extraction. The first one calls `measured`, and all return its result.
    """
    config.check(evaluation)
    with processes.group(timeout):
        device, data, embedder = config.device(device), config.data_of(run, data), embedder_of(run)
        parts = [features(run, embedder, data, part, evaluation, device) for part in (data.train, data.test)]
        return processes.from_first(lambda: measured(*parts))


def fitted(gallery, share=1.0, seed=0):
    chosen = tuning.subset(gallery.labels, share, seed)
    return probe.fit(gallery.clips[chosen], gallery.labels[chosen], len(gallery.videos.classes))


def result(run, name, digest, figures):
    """Writes all figures to `name`.json, and those that are numbers to the run's results.csv."""
    with checkpoint.whole(run / f"{name}.json") as file:
        file.write(json.dumps(dict(hash=digest, **figures), indent=1).encode() + b"\n")
    table = run / "results.csv"
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        rows = [(name, digest, what, value) for what, value in figures.items() if isinstance(value, (int, float))]
        csv.writer(file).writerows([("evaluation", "hash", "figure", "value")] * fresh + rows)
    named = [
        f"{pages.FIGURES[what][0]} {pages.value_of(what, x)}" for what, x in figures.items() if what in pages.FIGURES
    ]
    print(f"{name}: " + (", ".join(named) or f"{run / name}.json"))
    return figures


def main(arguments=None):
    """Runs a command, and raises its errors. With --dry-run among the arguments, see dryrun.py."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = dict(pretrain=pretrain, retrieval=retrieval, linear=linear, finetune=finetune, classify=classify)
    commands |= dict(multiclip=multiclip, confusion=confusion, ablation=ablation.run, report=page)
    if dryrun.FLAG in arguments:
        arguments = [each for each in arguments if each != dryrun.FLAG]
        commands = {name: dryrun.small(command) for name, command in commands.items()}
    else:
        commands |= dict(export=export, load=load, data=dict(_help="Checks a data set.", check=check))
    auto_cli(
        commands,
        args=arguments,
        prog="tclr",
        version=tclr_kernels.__version__,
        as_positional=False,
        parser_class=Parser,
        description=DESCRIPTION,
    )


def program():
    """The program `tclr`: runs `main` and prints an error in one line, or its traceback with TCLR_TRACEBACK=1."""
    if os.environ.get("TCLR_TRACEBACK") != "1":
        threading.excepthook = lambda raised: print(f"error: {in_a_line(raised.exc_value)}", file=sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.exit(f"error: {ended.code}")
        raise
    except Exception as error:
        if os.environ.get("TCLR_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {in_a_line(error)}")


def in_a_line(error):
    """An error in one line. For an unexpected one, also its type, and how to see where it was raised."""
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, FloatingPointError, processes.Elsewhere)):
        return text
    return f"{type(error).__name__}: {text} (TCLR_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    program()
