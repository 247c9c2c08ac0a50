"""The SimCLR loss of solo-learn (`from solo.losses import simclr_loss_func`), as its repository has it since 2021.

Source: https://github.com/vturrisi/solo-learn
"""

from torch import Tensor

from .. import candidates, distributed, general, losses
from ..distributed import Group, Shares
from . import shared


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """SimCLR's loss for any number of views, with the positives summed inside the logarithm.

        l_i = -log sum_(p in P(i)) h(z_i, z_p) / sum_(j != i) h(z_i, z_j),  P(i): the other rows of the same index

    z: [N, D], the rows of all views; indexes: [N], the index of the image (or class) of each row. If torch.distributed
    is initialised, it is the loss of the rows of all processes, as in solo-learn.
    Returns the mean over the rows; inf if a row has no positive, as solo-learn does.
    """
    (z,) = shared.rows(dict(z=z), group="world")
    keys = shared.keys("indexes", indexes, z, group="world")
    return shared.as_given(_simclr(z, keys, temperature, group="world"), z)


@distributed.collective
def _simclr(
    z: Tensor, keys: Tensor, temperature: float | Tensor, *, group: Group = None, shares: Shares = None
) -> Tensor:
    tau = losses._tau(shared.temperature(temperature), None, True, "mean", z, group)
    if group is None:
        return shared.rectangle(None, z, tau, True, (keys, keys), first=0).total(False, len(z))
    neg, _, pos_lse, *_ = candidates.all_pairs([z[None]], tau, True, False, None, keys[None], group)
    return losses._reduce(general.cost([neg], pos_lse), "mean", losses._rows(z, group), group)
