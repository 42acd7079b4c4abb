"""Diffusion-DPO: of two images of a prompt, the better is to be denoised better than by the base, the worse worse."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import logsigmoid

from mitune.finetuning.objectives.base import Batch, Needs, Network, squared_distance

BETA = 2000.0  # β: the smaller of 2000 and 5000, the ends of what the paper found best


class DPO:
    """−w log sigmoid(−β/2 [(e_w − e_w⁰) − (e_l − e_l⁰)]) with e = ‖f − u‖², for a winner and a loser of one prompt.

    Both are noised with the same ε at the same t. e is the mean over an image's values, as in the paper's code, to
    which its β of 2000 to 5000 belongs; its equation has the sum, and with that a β smaller by the number of values. It
    is the error of what the network predicts: that of another prediction is larger by (c/c')² (`base.py`).
    An image that no image of its prompt is worse than counts log 2, without gradient.

    The loss falls also where both errors rise, the loser's more: a loss near 0 is no sign that all is well.

    Source: Diffusion-DPO, arXiv 2311.12908.
    """

    needs: Needs = "ranked"

    def __call__(self, batch: Batch, network: Network) -> Tensor:
        is_pair = (batch.latents != batch.worse).flatten(1).any(dim=1)
        margin = _excess(batch, network) - _excess(replace(batch, latents=batch.worse), network)
        # Without a pair the margin is 0, but its gradient only but for rounding.
        return -batch.weights * logsigmoid(-BETA / 2 * margin * is_pair)


def _excess(batch: Batch, network: Network) -> Tensor:
    """e − e⁰, (B,): by how much the error is larger than that of the base."""
    base = squared_distance(network.reference(batch), batch.target)
    return squared_distance(network(batch), batch.target) - base
