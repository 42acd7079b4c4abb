"""The papers' fine-tuning: the loss that the model itself was trained with, on the images that were kept."""

from __future__ import annotations

from torch import Tensor

from mitune.finetuning.objectives.base import Batch, Needs, Network, squared_distance


class Denoising:
    """w ‖f − u‖², the mean over an image's values.

    Source: MI-TUNE, Algorithm 1; the weight w of an image is one unless its set gives it another.
    """

    needs: Needs = "kept"

    def __call__(self, batch: Batch, network: Network) -> Tensor:
        return batch.weights * squared_distance(network(batch), batch.target)
