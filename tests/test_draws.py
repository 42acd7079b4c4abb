"""What is random in an iteration: a function of seed and iteration, with the timesteps that Table 8 asks for."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.path import path_of
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw, shift_of
from tests.sets import write_set


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


def test_shift_that_depends_on_the_resolution_is_left_out():
    assert shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)) == 1.0
    assert shift_of(DDIMScheduler()) == 1.0


def test_batch_is_rows_of_the_set(images):
    path = path_of(DDIMScheduler())
    drawn = draw(images, path, 1.0, FinetuneConfig(batch_size=16), 0)
    part = torch.tensor([3, 11])
    batch = drawn.batch(part, images, path, torch.device("cpu"))
    rows = drawn.rows[part]
    assert torch.equal(batch.latents, images.latents[rows])
    assert torch.equal(batch.noise, drawn.noise[part])
    assert torch.equal(batch.timesteps, drawn.timesteps[part])
    name = "encoder_hidden_states"
    assert torch.equal(batch.conditioning.rows[name], images.conditioning.rows[name][rows])
    assert batch.prompts == [images.prompts[row] for row in rows.tolist()]
    assert batch.weights.tolist() == batch.advantages.tolist() == [1.0, 1.0]
    assert torch.equal(batch.worse, batch.latents)


def test_worse_images_are_of_the_same_prompt_and_have_less_advantage(images):
    """Rows 0, 2, 4 and 1, 3, 5 are of two prompts; of the first, row 4 is the worst, of the second, all are equal."""
    advantages = torch.tensor([1.0, 0.5, 0.0, 0.5, -1.0, 0.5])
    ranked, path = replace(images, advantages=advantages, is_ranked=True), path_of(DDIMScheduler())
    config = FinetuneConfig(batch_size=600)
    drawn = draw(ranked, path, 1.0, config, 0)
    pairs = set(zip(drawn.rows.tolist(), drawn.worse.tolist(), strict=True))
    assert pairs == {(0, 2), (0, 4), (2, 4), (4, 4), (1, 1), (3, 3), (5, 5)}
    # The rest of the draw is that of a set without ranks.
    plain = draw(images, path, 1.0, config, 0)
    assert torch.equal(plain.noise, drawn.noise)
    assert torch.equal(plain.timesteps, drawn.timesteps)
    batch = drawn.batch(torch.arange(600), ranked, path, torch.device("cpu"))
    assert torch.equal(batch.worse, images.latents[drawn.worse])
    assert torch.equal(batch.advantages, advantages[drawn.rows])
