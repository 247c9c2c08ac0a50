"""Contrastive losses that never hold the similarity matrix: NT-Xent, CLIP, and the three losses of TCLR."""

from .backends import available_backends
from .gram import Blocks, LabelledBlocks, LabelledRows, gram, pair_sum, rectangle
from .losses import (
    TCLRTerms,
    clip_loss,
    global_local,
    info_nce,
    instance_contrastive,
    local_local,
    nt_xent,
    sup_con,
    tclr,
)
from .modules import (
    CLIPLoss,
    GlobalLocalLoss,
    InfoNCELoss,
    InstanceContrastiveLoss,
    LocalLocalLoss,
    NTXentLoss,
    SupConLoss,
    TCLRLoss,
)
from .queue import NegativeQueue

__version__ = "0.1.0"

__all__ = [
    "Blocks",
    "CLIPLoss",
    "GlobalLocalLoss",
    "InfoNCELoss",
    "InstanceContrastiveLoss",
    "LabelledBlocks",
    "LabelledRows",
    "LocalLocalLoss",
    "NTXentLoss",
    "NegativeQueue",
    "SupConLoss",
    "TCLRLoss",
    "TCLRTerms",
    "available_backends",
    "clip_loss",
    "global_local",
    "gram",
    "info_nce",
    "instance_contrastive",
    "local_local",
    "nt_xent",
    "pair_sum",
    "rectangle",
    "sup_con",
    "tclr",
]
