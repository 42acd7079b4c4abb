"""Known answers for the loss: diffusers' own targets, an exact denoiser, and the timesteps that Table 8 asks for."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.path import path_of
from mitune.errors import ModelError
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.loss import denoising_errors, draw, encode, shift_of, target_of
from tests.sets import BUILDERS, CALLS, write_set
from tests.tiny import PROMPTS, tiny_sd


def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_that_of_the_scheduler(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    latents, noise = latents_and_noise()
    t = torch.tensor([0, 10, 500, 900, 999])
    velocity = scheduler.get_velocity(latents, noise, t)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    assert torch.allclose(target_of(latents, noise, t.float(), path_of(scheduler)), expected, atol=1e-5)


def test_target_of_a_flow_is_noise_minus_latents():
    latents, noise = latents_and_noise()
    path = path_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(target_of(latents, noise, torch.full((5,), 300.0), path), noise - latents)


class ExactDenoiser(nn.Module):
    """Knows the latents of its one image, so the noise in z is no secret to it; off by one half."""

    dtype = torch.float32

    def __init__(self, scheduler, latents):
        super().__init__()
        self.scheduler, self.latents, self.told = scheduler, latents, None

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        assert not return_dict
        assert encoder_hidden_states.shape == (5, 2, 3)
        self.told = timestep
        shape = (-1, 1, 1, 1)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = (timestep / 1000).view(shape)
            exact = (sample - (1 - sigma) * self.latents) / sigma - self.latents
        else:
            alpha_bar = self.scheduler.alphas_cumprod[timestep.long()].view(shape)
            noise = (sample - alpha_bar.sqrt() * self.latents) / (1 - alpha_bar).sqrt()
            exact = {
                "epsilon": noise,
                "sample": self.latents,
                "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.latents,
            }[self.scheduler.config.prediction_type]
        return (exact + 0.5,)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        DDIMScheduler(prediction_type="sample"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["epsilon", "velocity", "sample", "flow"],
)
def test_error_of_an_exact_denoiser_is_its_offset_squared(scheduler):
    latents, noise = latents_and_noise()
    denoiser, t = ExactDenoiser(scheduler, latents), torch.tensor([100.0, 300.0, 500.0, 700.0, 900.0])
    conditioning = {"encoder_hidden_states": torch.zeros(5, 2, 3)}
    errors = denoising_errors(denoiser, latents, conditioning, noise, t, path_of(scheduler))
    assert torch.allclose(errors, torch.full((5,), 0.25), atol=1e-3)
    assert torch.equal(denoiser.told, t)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return TrainingSet.read(write_set("sd", tmp_path_factory.mktemp("sets") / "sd"))


def test_draw_is_a_function_of_seed_and_iteration(images):
    path, config = path_of(DDIMScheduler()), FinetuneConfig(batch_size=16)

    def flat(seed, iteration):
        drawn = draw(images, path, 1.0, FinetuneConfig(batch_size=16, seed=seed), iteration)
        assert drawn.noise.shape == (16, 4, 8, 8)
        return torch.cat([drawn.rows.float(), drawn.timesteps, drawn.noise.flatten()])

    first = flat(0, 3)
    torch.manual_seed(9)
    assert torch.equal(flat(0, 3), first)
    assert not torch.equal(flat(0, 4), first)
    assert not torch.equal(flat(1, 3), first)
    assert torch.equal(draw(images, path, 1.0, config, 3).rows, first[:16].long())


def test_timesteps_of_table_8(images):
    """U(500, 1000) is the default; 20,000 draws miss an end of it with probability 2 (1 − 1/500)^20000 < 1e-16."""
    drawn = draw(images, path_of(DDIMScheduler()), 1.0, FinetuneConfig(batch_size=20_000), 0)
    assert (drawn.timesteps.min().item(), drawn.timesteps.max().item()) == (500.0, 999.0)
    assert drawn.rows.unique().tolist() == [0, 1, 2, 3, 4, 5]
    everything = FinetuneConfig(batch_size=20_000, timesteps=(0.0, 1.0))
    drawn = draw(images, path_of(DDIMScheduler()), 1.0, everything, 0)
    assert (drawn.timesteps.min().item(), drawn.timesteps.max().item()) == (0.0, 999.0)
    point = FinetuneConfig(batch_size=20_000, timesteps=(0.9999, 1.0))
    assert draw(images, path_of(DDIMScheduler()), 1.0, point, 0).timesteps.unique().tolist() == [999.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_of_a_flow_are_shifted_as_in_sampling(images, shift):
    """σ ~ U(0.5, 1) before the shift; the sampler's own σ on a uniform grid of the same range bound it after."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert shift_of(scheduler) == shift
    sampled = scheduler.sigmas[:500]  # σ = 1, 0.999, … 0.501 before the shift
    t = draw(images, path_of(scheduler), shift, FinetuneConfig(batch_size=20_000), 0).timesteps / 1000
    assert t.min().item() == pytest.approx(sampled.min().item(), abs=2e-3)
    assert t.max().item() == pytest.approx(1.0, abs=1e-3)
    assert t.mean().item() == pytest.approx(sampled.mean().item(), abs=0.005)  # the error of the mean is 0.001


def test_shift_that_hangs_on_the_resolution_is_left_out():
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)) == 1.0
    assert shift_of(DDIMScheduler()) == 1.0


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_encoding_gives_what_the_pipeline_told_its_denoiser(kind, tmp_path):
    images, pipe = TrainingSet.read(write_set(kind, tmp_path / "set")), BUILDERS[kind]()
    encoded = encode(pipe, PROMPTS, CALLS[kind], images.conditioning)
    assert len(encoded) == (1 if kind == "sd" else 2)
    for name, tensor in encoded.items():
        assert torch.allclose(tensor, images.conditioning[name][:2], atol=1e-6)
    sum(tensor.sum() for tensor in encoded.values()).backward()
    assert pipe.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_encoding_for_an_unknown_denoiser_is_refused():
    with pytest.raises(ModelError, match="cannot train the text encoders of StableDiffusionPipeline"):
        encode(tiny_sd(), PROMPTS, {}, ["encoder_hidden_states", "pooled_projections"])
