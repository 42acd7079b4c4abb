"""The one denoiser: ε̂ and predictions of a pipeline's network, against the network called by hand."""

import pytest
import torch

from mitune.denoiser.conditioning import stack
from mitune.denoiser.epsilon import Denoiser, NetworkDenoiser
from mitune.denoiser.opening.models import Model
from mitune.denoiser.replay import condition
from tests.tiny import PROMPTS, SD3_CALL, tiny_sd, tiny_sd3

LOG_SNR = torch.tensor([-1.0, 2.0])
NOISY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PIPELINES = {"sd": tiny_sd, "sd-v": lambda: tiny_sd(prediction_type="v_prediction"), "sd3": tiny_sd3}


@pytest.fixture(params=PIPELINES)
def model(request):
    return Model(PIPELINES[request.param](), SD3_CALL if request.param == "sd3" else {}, request.param)


@torch.no_grad()
def test_by_hand(model):
    """ε, and v = αε − σz₀ (VP) or ε − z₀ (flow), of which z = α z₀ + σ ε makes ε."""
    conditioning = condition(model, PROMPTS)
    denoiser: Denoiser = model.denoiser
    path = denoiser.path
    t = path.timestep(LOG_SNR)
    alpha, sigma = (level(t).reshape(2, 1, 1, 1) for level in (path.alpha, path.sigma))
    ((_, arguments),) = conditioning.arguments()
    output = model.denoiser.network(NOISY, timestep=t, **arguments, return_dict=False)[0]
    assert torch.equal(denoiser.prediction(NOISY, t, conditioning), output)
    by_hand = {
        "sd": output,
        "sd-v": sigma * NOISY + alpha * output,
        "sd3": NOISY + alpha * output,
    }[model.name]
    torch.testing.assert_close(denoiser.epsilon(NOISY, LOG_SNR, conditioning), by_hand, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_level_for_all_or_one_each(model):
    conditioning = condition(model, PROMPTS)
    each = model.denoiser.epsilon(NOISY, LOG_SNR, conditioning)
    for row, level in enumerate(LOG_SNR):
        torch.testing.assert_close(model.denoiser.epsilon(NOISY, level, conditioning)[row], each[row])


@torch.no_grad()
def test_texts_of_other_lengths_keep_their_places():
    """Those of one length go in one call; the answers come back in order."""
    model = Model(tiny_sd(), {}, "sd")
    whole = condition(model, PROMPTS)
    short = type(whole)(rows={name: value[:, :3] for name, value in whole.rows.items()}, call=whole.call)
    mixed = stack([whole.take([0]), short.take([0, 1]), whole.take([1])])
    noisy = torch.cat([NOISY, NOISY.flip(0)])
    answers = model.denoiser.epsilon(noisy, LOG_SNR[0], mixed)
    alone = [
        model.denoiser.epsilon(noisy[[row]], LOG_SNR[0], part)
        for row, part in enumerate([whole.take([0]), short.take([0]), short.take([1]), whole.take([1])])
    ]
    torch.testing.assert_close(answers, torch.cat(alone))


def test_it_settles_the_precision():
    """Answers are float32, whatever the network's own."""
    model = Model(tiny_sd().to(dtype=torch.bfloat16), {}, "sd")
    with torch.no_grad():
        answer = model.denoiser.epsilon(NOISY, LOG_SNR, condition(model, PROMPTS))
    assert answer.dtype == torch.float32 and answer.isfinite().all()
    assert isinstance(model.denoiser, NetworkDenoiser) and model.denoiser.device == torch.device("cpu")
