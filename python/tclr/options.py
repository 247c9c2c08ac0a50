"""The help texts of all options, and errors of the command line in one line."""

import difflib
import re

from jsonargparse import ArgumentParser

GROUPS = {
    "data": "The videos",
    "net": "The network",
    "clips": "The frames of a clip",
    "recipe": "The pretraining",
    "evaluation": "The clips that an evaluation reads",
    "scale": "The size of the ablation",
}
HELP = {
    "run": "folder of a pretraining",
    "out": "folder to write to; for data check, the CSV file",
    "device": "cpu, cuda, cuda:1, ...; auto: a GPU if there is one",
    "resume": "continue from the folder's last.pt",
    "overwrite": "replace the run that the folder holds",
    "timeout": "seconds that a process waits for the others",
    "share": "share of the labels to train on, above 0 and at most 1, from every class alike",
    "seed": "seed of all random numbers",
    "epochs": "passes over the labelled videos",
    "batch": "clips per step",
    "lr": "learning rate",
    "classes": "the classes to draw, such as '[Archery, Biking]'; without it, all",
    "classifier": "the classifier to apply: a file of RUN, named without .pt, such as finetune or linear-0.1",
    "file": "file of weights",
    "format": "format of the file of weights",
    "dataset": "kind of data set",
    "root": "folder of the data set",
    "part": "part to check, such as train or test",
    "split": "number of the data set's split",
    "window": "frames that a video should have",
    "seeds": "number of seeds of the rows that the claims are about",
    "other_seeds": "number of seeds of the other rows",
    "label_seeds": "number of seeds whose networks are finetuned on few labels",
    "job": "number of a job, to run only this one; --plan true lists them",
    "plan": "list the jobs and run none",
    "data": "evaluate on other videos than those of the pretraining; --data.help lists the keys, such as --data.root",
    "data.dataset": "kind of data set",
    "data.root": "its folder",
    "data.split": "number of its split",
    "data.train": "name of the part to train on",
    "data.test": "name of the part to test on",
    "data.size": "bring all videos to this height and width, such as '[128, 171]'",
    "net.backbone": "architecture",
    "net.width": "channels of the first stage",
    "net.dim": "size of an embedding",
    "clips.frames": "frames of a clip",
    "clips.stride": "the global clip has every STRIDE-th frame of the window; also the number of local clips",
    "clips.windows": "whether the two views of a video show the same frames or two independent windows",
    "clips.decay": "for independent windows: how strongly near ones are preferred; 0: not at all, 1: as in CVRL",
    "recipe.steps": "number of steps; 0: as many as --recipe.epochs needs",
    "recipe.epochs": "passes over the videos, if steps is 0",
    "recipe.batch": "videos per batch",
    "recipe.accumulate": "batches whose gradients are added up for one step",
    "recipe.optimizer": "AdamW or Adam",
    "recipe.lr": "peak learning rate",
    "recipe.schedule": "cosine with a warm-up, or plateau, which divides the rate by 10 when the loss stops falling, "
    "as the official code does",
    "recipe.warmup": "steps of the cosine's warm-up",
    "recipe.weight_decay": "weight decay",
    "recipe.temperature": "temperature of the losses",
    "recipe.learn_temperature": "learn the temperature; recipe.temperature is its initial value",
    "recipe.weights": "weights of the terms, such as '{ic_global: 1.0, ll: 1.0, gl: 0.0}'; default: those of the form",
    "recipe.form": "the objective: that of the paper or of the official code",
    "recipe.queue": "number of earlier global clips that are further negatives; 0: none",
    "recipe.backend": "backend of tclr_kernels; without it, the best one",
    "recipe.augment": "augmentation: of the demo or of the official code",
    "recipe.side": "height and width of a clip in pixels",
    "recipe.amp": "mixed precision",
    "recipe.compile": "compile the network by torch.compile",
    "recipe.readers": "threads that decode the next batch during a step; 0: none",
    "recipe.checkpoint_every": "steps between two checkpoints",
    "recipe.seed": "seed of all random numbers",
    "evaluation.clips": "evenly spaced clips per video",
    "evaluation.frames": "frames of a clip",
    "evaluation.stride": "a clip has every STRIDE-th frame of the video",
    "evaluation.side": "height and width of a clip in pixels",
    "evaluation.pooled": "average the features over the time of a clip, instead of concatenating them",
    "scale.groups": "number of groups of training videos; all videos of a group show the same actor",
    "scale.test_groups": "number of groups of test videos",
    "scale.takes": "videos of each class in a group",
    "scale.video_frames": "frames of a video",
    "scale.video_side": "height and width of a video in pixels",
    "scale.frames": "frames of a clip",
    "scale.stride": "the global clip has every STRIDE-th frame of the window",
    "scale.side": "height and width of a clip in pixels",
    "scale.width": "channels of the network's first stage",
    "scale.steps": "steps of each pretraining",
    "scale.batch": "videos per step",
    "scale.lr": "peak learning rate",
    "scale.temperature": "temperature of the losses",
    "scale.eval_clips": "clips per video in the evaluation",
    "scale.eval_stride": "a clip of the evaluation has every EVAL_STRIDE-th frame of the video",
}


DRY_RUN = "try the command on a few small generated videos"


class Parser(ArgumentParser):
    """jsonargparse's parser with the help texts above, errors in one line, and short names of types."""

    def add_argument(self, *names, **settings):
        name = names[0].lstrip("-") if names else None
        if name in HELP and settings.get("help") is None:
            settings["help"] = HELP[name]
        return super().add_argument(*names, **settings)

    def add_argument_group(self, *titles, name=None, **settings):
        titles = (GROUPS[name],) if name in GROUPS else titles
        return super().add_argument_group(*titles, name=name, **settings)

    def error(self, message, ex=None):
        parser = getattr(ex, "subcommand_parser", None) or self
        message = short_types(" ".join(message.split()))
        for pattern, plain in PLAINER:
            message = re.sub(pattern, plain, message)
        if unknown := re.search(r"^unknown option: (\S+)", message):
            known = [*parser._option_string_actions, "--dry-run"]
            near = difflib.get_close_matches(unknown[1], known, 1, 0.5)
            message += f", did you mean {near[0]}?" * bool(near)
        if (typed := re.search(r"^--(\S+): found .* of type", message)) and typed[1] in HELP:
            message += f": {HELP[typed[1]]}"
        self.exit(2, f"error: {message} ({parser.prog.replace(' [options]', '')} --help lists what there is)\n")

    def format_help(self):
        command = self.prog.split()[-1]
        small = f"\n  --dry-run             {DRY_RUN}\n" * (command not in ("tclr", "export", "load", "data", "check"))
        return short_types(super().format_help()) + small


PLAINER = (  # what jsonargparse says, and what users are told
    (r'^expected "subcommand" .*', "found no command, wanted one, such as pretrain"),
    (r"^argument subcommand: invalid choice: '(.*)' \(choose from (.*)\)$", r"command: found '\1', wanted one of \2"),
    (r"required: \w+\.(\w+)", r"required: --\1"),
    (r'Parser key "([^"]+)"', r"--\1"),
    (r"^unrecognized arguments: ", "unknown option: "),
    (r"^Subcommand '\w+' does not accept option '([^']+)'", r"unknown option: --\1, in the configuration file"),
    (r"Expected a (?:typing\.)?Literal\[(.*)\]\. Got value: (.*)$", r"found '\2', wanted one of \1"),
    (r"Expected an? (\w+)\. Got value: (.*)$", r"found '\2', wanted a value of type \1"),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*), NoneType\] .*Given value: (.*)$",
        r"found '\2', wanted a value of type \1",
    ),
)


def short_types(text):
    text = re.sub(r"<class\s+'(?:\w+\.)*(\w+)'>", r"\1", text)
    return text.replace("Show the help for OtherData", "List the keys of --data").replace("OtherData", "data set")
