"""The evidence is the denoiser's own, whatever stands beside an image."""

import pytest
import torch

from mitune.denoiser.opening.models import Model
from mitune.denoiser.path import path_of
from mitune.denoiser.replay import condition
from mitune.information.contrast import ASKED, CHOSEN, LOG_SNR_RANGE
from mitune.pool.evidence import gather, told_apart
from mitune.prompts.rivals import NEGATIVES, NULL, words_left_out
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3


@pytest.fixture(params=["sd", "sd3"])
def model(request):
    extra = SD3_CALL if request.param == "sd3" else {}
    pipe = tiny_sd3() if request.param == "sd3" else tiny_sd()
    return Model(pipe, {"guidance_scale": 3.0, "num_inference_steps": 4, **extra}, request.param)


def test_evidence_by_hand(model):
    """‖ε̂ − ε‖² at the first λ, from the denoiser's own output; the same for an image alone and beside others."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    rivals = {NEGATIVES: ["two blue cubes"], NULL: [""]}
    evidence = gather(model, latents, "a red ball", rivals, draws=3, seed=5, batch_size=7)
    assert evidence.kinds == (ASKED, NEGATIVES, NULL)
    assert evidence.errors.shape == evidence.distances.shape == (3, 3, 3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))[0]
    known = condition(model, ["a red ball", "two blue cubes"])
    path = path_of(model.pipe.scheduler)
    log_snr = torch.tensor(LOG_SNR_RANGE[0] + (LOG_SNR_RANGE[1] - LOG_SNR_RANGE[0]) / 6)
    t = path.timestep(log_snr)
    alpha, sigma = path.alpha(t), path.sigma(t)
    errors, distances = [], []
    for epsilon in (noise, -noise):
        noisy = (alpha * latents[:1] + sigma * epsilon).expand(2, -1, -1, -1)
        with torch.no_grad():
            if model.name == "sd":
                predicted = model.pipe.unet(noisy, t, known.rows["encoder_hidden_states"]).sample
            else:
                velocity = model.pipe.transformer(
                    noisy, known.rows["encoder_hidden_states"], known.rows["pooled_projections"], t.expand(2)
                ).sample
                predicted = noisy + alpha * velocity  # v = ε − z₀
        errors.append(((predicted - epsilon) ** 2).sum(dim=(1, 2, 3)))
        distances.append(((predicted[1] - predicted[0]) ** 2).sum())
    torch.testing.assert_close(evidence.errors[0, :2, 0], sum(errors) / 2, rtol=1e-4, atol=1e-3)
    assert evidence.distances[0, 1, 0].item() == pytest.approx(sum(distances).item() / 2, rel=1e-3)
    assert not evidence.distances[:, 0].any()
    alone = gather(model, latents[2:], "a red ball", rivals, draws=3, seed=5, batch_size=1)
    torch.testing.assert_close(evidence.errors[2:], alone.errors, rtol=1e-4, atol=1e-3)


def test_each_image_may_see_prompts_of_its_own(model):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    rivals = {NEGATIVES: ["two blue cubes", "a blue ball"], NULL: [""]}
    places = torch.tensor([[0, 1], [0, 3], [0, 2]])
    whole = gather(model, latents, "a red ball", rivals, draws=2)
    part = gather(model, latents, "a red ball", rivals, places=places, draws=2, batch_size=4)
    assert part.kinds == (ASKED, CHOSEN)
    torch.testing.assert_close(part.errors, whole.at(places).errors, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(part.distances, whole.at(places).distances, rtol=1e-3, atol=1e-4)


def test_told_apart_follows_the_margins(model):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    prompts = ["a red ball", "two blue cubes", "a red ball"]
    rivals = {"a red ball": ["a blue ball", "two red cubes"], "two blue cubes": ["a cube"]}
    told = told_apart(model, latents, prompts, rivals, draws=2)
    assert [len(each) for each in told] == [2, 1, 2]
    evidence = gather(model, latents[[0, 2]], "a red ball", {NEGATIVES: rivals["a red ball"]}, draws=2)
    assert [told[0], told[2]] == (evidence.margins > 0).tolist()


def test_words_left_out():
    assert words_left_out("a red circle and a square") == [
        "a circle and a square",
        "a red and a square",
        "a red circle and a",
    ]
    assert words_left_out("a") == []
