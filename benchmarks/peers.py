"""Adapters for other libraries: each makes losses for a temperature, or raises the reason why it cannot."""

import importlib
import importlib.util
import sys
import types

import torch
import torch.nn.functional as F

from . import baselines


def hollow(*names):
    """Registers empty packages of these names, so that their other modules import without what these would import."""
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = spec.submodule_search_locations or []


def lightly(tau):
    hollow("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.models.utils")  # torchvision
    from lightly.loss.dcl_loss import DCLLoss
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return dict(nt_xent=NTXentLoss(temperature=tau), dcl=DCLLoss(temperature=tau))


def metric_learning(tau):
    from pytorch_metric_learning.losses import NTXentLoss

    return dict(nt_xent=_labelled(NTXentLoss(temperature=tau)))


def metric_learning_supcon(tau):
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=tau)
    return dict(nt_xent=_labelled(loss), sup_con=lambda z: loss(z, baselines.classes(len(z))))


def _labelled(loss):
    """A loss of rows and labels, as NT-Xent of two views."""
    return lambda a, b: loss(torch.cat([a, b]), torch.arange(len(a)).repeat(2))


def open_clip(tau):
    hollow("open_clip")  # torchvision
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return dict(clip=lambda a, b: loss(F.normalize(a), F.normalize(b), 1 / tau))


def ranking():
    """The MultipleNegativesRankingLoss of sentence-transformers, without its models and what they import."""
    hollow(*(f"sentence_transformers{x}" for x in ("", ".base", ".base.losses", ".sentence_transformer")))
    hollow("sentence_transformers.sentence_transformer.losses")
    utilities = _stand_in("sentence_transformers.util")
    utilities.cos_sim = lambda a, b: F.normalize(a, p=2, dim=1).mm(F.normalize(b, p=2, dim=1).transpose(0, 1))
    utilities.get_rank, utilities.all_gather_with_grad, utilities.similarity_fct_name = int, None, None
    forward = _stand_in("sentence_transformers.base.losses.merged_forward")
    forward.embed_columns = lambda model, columns: [model(x)["sentence_embedding"] for x in columns]
    _stand_in("sentence_transformers.sentence_transformer.model").SentenceTransformer = None
    name = "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking"
    return importlib.import_module(name).MultipleNegativesRankingLoss


def _stand_in(name):
    """A module that takes the place of one that is imported but not needed."""
    return sys.modules.setdefault(name, types.ModuleType(name))


def flex_attention(tau):
    """NT-Xent by FlexAttention's log-sum-exp: each row attends to all others."""
    from torch.nn.attention import flex_attention as flex

    attend = torch.compile(flex.flex_attention, dynamic=False)

    def nt_xent(a, b):
        z = F.normalize(torch.cat([a, b]))
        heads = z[None, None]
        others = flex.create_block_mask(lambda b, h, i, j: i != j, None, None, len(z), len(z), device=z.device)
        _, aux = attend(heads, heads, heads, block_mask=others, scale=1 / tau, return_aux=flex.AuxRequest(lse=True))
        return (aux.lse[0, 0] - (z * z.roll(len(a), 0)).sum(1) / tau).mean()

    return dict(nt_xent=nt_xent)


def inf_cl(tau):
    _needs_gpu()
    from inf_cl import cal_inf_loss

    return dict(clip=lambda a, b: cal_inf_loss(F.normalize(a), F.normalize(b), scale=torch.tensor(1 / tau)))


def memeff(tau):
    _needs_gpu()
    raise ModuleNotFoundError("memory-efficient-contrastive-loss is not on the package index")


def _needs_gpu():
    if not torch.cuda.is_available():
        raise RuntimeError("it has GPU kernels only, and this machine has no GPU")
