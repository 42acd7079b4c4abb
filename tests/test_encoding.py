"""Text encoders in training give what they gave the pipeline, but with gradients."""

import pytest
import torch

from mitune.denoiser.encoding import encode
from mitune.errors import ModelError
from mitune.finetuning.dataset import TrainingSet
from tests.sets import write_set
from tests.tiny import BUILDERS, CALLS, PROMPTS, tiny_sd


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_encoding_gives_what_the_pipeline_told_its_denoiser(kind, tmp_path):
    images, pipe = TrainingSet.read(write_set(kind, tmp_path / "set")), BUILDERS[kind]()
    encoded = encode(pipe, PROMPTS, CALLS[kind], images.conditioning.rows)
    assert len(encoded) == (1 if kind == "sd" else 2)
    for name, tensor in encoded.items():
        assert torch.allclose(tensor, images.conditioning.rows[name][:2], atol=1e-6)
    sum(tensor.sum() for tensor in encoded.values()).backward()
    assert pipe.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_encoding_for_an_unknown_denoiser_is_refused():
    with pytest.raises(ModelError, match="cannot train the text encoders of StableDiffusionPipeline"):
        encode(tiny_sd(), PROMPTS, {}, ["encoder_hidden_states", "pooled_projections"])
