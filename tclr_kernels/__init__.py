"""Contrastive losses that never hold the similarity matrix: NT-Xent, CLIP, and the three losses of TCLR."""

from .backends import available_backends
from .gram import Blocks, LabelledBlocks, LabelledRows, gram, pair_sum, rectangle
from .losses import TCLRTerms, clip_loss, global_local, instance_contrastive, local_local, nt_xent, tclr
from .modules import (
    CLIPLoss,
    GlobalLocalLoss,
    InstanceContrastiveLoss,
    LocalLocalLoss,
    NTXentLoss,
    TCLRLoss,
)

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "CLIPLoss",
    "GlobalLocalLoss",
    "InstanceContrastiveLoss",
    "LabelledBlocks",
    "LabelledRows",
    "LocalLocalLoss",
    "NTXentLoss",
    "TCLRLoss",
    "TCLRTerms",
    "available_backends",
    "clip_loss",
    "global_local",
    "gram",
    "instance_contrastive",
    "local_local",
    "nt_xent",
    "pair_sum",
    "rectangle",
    "tclr",
]
