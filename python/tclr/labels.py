"""Label efficiency: finetunes the networks of the ablation, including the untrained one, on shares of the labels.

A share is a random part of every class. The networks are those that the ablation has saved. This is done as in
`tclr finetune`, but with a higher learning rate, since the network is small, and with another augmentation, since the
release's flips videos, and some classes here differ by left and right.
"""

import torch

from . import ablation, checkpoint, motions, train
from . import finetune as tuning
from .augment import Augment
from .config import Evaluation
from .features import code_hash
from .models import TinyResNet3d

ROWS = ablation.SCRATCH, ablation.INVARIANT, ablation.TCLR
CODE = "augment", "clips", "finetune", "labels", "models", "motions"
SHARES = 0.01, 0.1, 0.2, 0.5
SETTINGS = dict(epochs=20, batch=16, lr=2e-3)


def named(weights):
    return weights.with_name(f"{weights.stem}-finetuned-{code_hash(*CODE)[:8]}.json")


def measure(out, job, weights):
    """The figures of a network: "finetuned" {share of the labels: accuracy}."""
    a, (train_set, test_set) = job.scale, ablation.data(out, job.scale, job.seed)
    evaluation = Evaluation(clips=a.eval_clips, frames=a.frames, stride=a.eval_stride, side=a.side)
    by_share = {}
    for share in SHARES:
        embedder = train.Embedder(TinyResNet3d(a.width))
        embedder.load_state_dict(checkpoint.load(weights)["embedder"])
        torch.manual_seed(job.seed)
        model = tuning.Classifier(embedder.backbone, len(motions.ROUTINES))
        chosen = tuning.subset(train_set.labels, share, job.seed)
        settings = SETTINGS | dict(seed=job.seed, augment=Augment, record=lambda **_: None)
        tuning.finetune(model, train_set, chosen, evaluation, **settings)
        by_share[str(share)] = tuning.accuracy(model, test_set, evaluation)
    return dict(finetuned=by_share)
