"""Hard negatives are wrong for every scene of the asked prompt, and errors are paired."""

import random

import pytest
import torch

from mitune.contrast import LOG_SNR_RANGE, denoising_errors, shapes_negatives
from mitune.generate import condition
from mitune.models import Model
from mitune.path import path_of
from mitune.shapes.grammar import CATEGORIES, parse
from mitune.shapes.prompts import prompt_list
from mitune.shapes.scene import parts, sample_scene
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_scene_fits_a_negative(category):
    rng = random.Random(0)
    for listed in prompt_list(category):
        scene = sample_scene(parse(listed.text), rng)
        negatives = shapes_negatives(listed.text)
        assert len({n.prompt for n in negatives}) == len(negatives)
        for negative in negatives:
            assert not all(met for _, met in parts(scene, parse(negative.prompt))), (listed.text, negative)


def test_kinds_follow_the_prompt():
    kinds = {n.kind for n in shapes_negatives("a red circle to the left of a blue square")}
    assert {"color swapped", "relation turned", "object exchanged"} <= kinds
    counts = [n.prompt for n in shapes_negatives("five red circles") if n.kind == "count changed"]
    assert counts == ["four red circles", "six red circles"]


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_errors_by_hand(family):
    """‖ε̂ − ε‖² at the first λ, from the denoiser's own output; the same for a row alone and beside others."""
    extra = SD3_CALL if family == "sd3" else {}
    pipe = tiny_sd3() if family == "sd3" else tiny_sd()
    model = Model(pipe, {"guidance_scale": 3.0, "num_inference_steps": 4, **extra}, family)
    prompts = ["a red ball", "two blue cubes", "a red ball"]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    errors = denoising_errors(model, latents, prompts, draws=3, seed=5, batch_size=2)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    known = condition(model, prompts[:1])
    path, log_snr = path_of(pipe.scheduler), torch.tensor(LOG_SNR_RANGE[0])
    t = path.timestep(log_snr)
    alpha, sigma = path.alpha(t), path.sigma(t)
    noisy = alpha * latents[:1] + sigma * noise
    with torch.no_grad():
        if family == "sd":
            predicted = pipe.unet(noisy, t, known["encoder_hidden_states"]).sample
        else:
            velocity = pipe.transformer(
                noisy, known["encoder_hidden_states"], known["pooled_projections"], t.reshape(1)
            ).sample
            predicted = noisy + alpha * velocity  # v = ε − z₀
    assert errors.shape == (3, 3)
    assert errors[0, 0].item() == pytest.approx(((predicted - noise) ** 2).sum().item(), rel=1e-4)
    alone = denoising_errors(model, latents[2:], prompts[2:], draws=3, seed=5, batch_size=1)
    torch.testing.assert_close(errors[2:], alone, rtol=1e-4, atol=1e-4)
