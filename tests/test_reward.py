"""The reward has its known values, costs what it says, and is held against a judge within each prompt."""

import math

import numpy as np
import pytest
import torch

from mitune.bench.reward import (
    REWARD,
    VARIANTS,
    Judged,
    correlation,
    discernment,
    guarded,
    page_of,
    wrong_negatives,
)
from mitune.cli import app
from mitune.denoiser.network import denoiser_of, rows_counted
from mitune.denoiser.opening.models import Model
from mitune.information.contrast import ASKED, CHOSEN, Evidence
from mitune.information.reward import CONFIDENCE, HARDEST, SHARPNESS, hardest, log_odds, reward
from mitune.pool.evidence import gather
from mitune.pool.reward import ONLINE
from mitune.pool.scores import Candidates, score_named
from mitune.prompts.rivals import NEGATIVES, NULL, WIDER
from tests.test_contrast import MEANS, gaussian_evidence
from tests.test_statistics import cells
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3


def test_log_odds_of_equal_rivals():
    """K rivals with the same margin m share half of the prior: the odds are those of one, e^(sharpness · m)."""
    margins = torch.tensor([[0.7] * 5, [-1.2] * 5], dtype=torch.float64)
    expected = SHARPNESS * torch.tensor([0.7, -1.2], dtype=torch.float64)
    torch.testing.assert_close(log_odds(margins, 5), expected)
    beaten = torch.cat([margins, torch.full((2, 3), 40.0, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(log_odds(beaten, 8), log_odds(margins, 8))  # beaten rivals need not be asked about
    assert not log_odds(margins[:, :0], 0).any()


def test_the_reward_tells_samples_of_the_prompt_from_those_of_a_rival():
    """Margins of N(0, I) and N(μ, I), D = ‖μ‖²/2 = 4.5, are N(±D, 2D): one is above another with Φ(√D) = 0.983."""
    kinds = (ASKED, NEGATIVES)
    of_both = [gaussian_evidence(MEANS[:2], kinds, samples=1000, source=source) for source in (0, 1)]
    right, wrong = (reward(each.margins, 1, torch.zeros(1000)) for each in of_both)
    above = (right[:, None] > wrong).double().mean().item()
    assert above == pytest.approx(0.983, abs=4 * math.sqrt(0.983 * 0.017 / 1000))
    assert wrong.min() >= 0 and right.max() <= 1


def test_confidence_counts_in_its_own_deviations():
    margins = torch.tensor([[0.3, -0.2], [2.0, 0.1], [0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)
    confidence = torch.tensor([-0.30, -0.10, math.nan, -0.20])
    values = reward(margins, 2, confidence)
    torch.testing.assert_close(values, reward(margins, 2, 7 * confidence + 3), equal_nan=True, rtol=1e-5, atol=0)
    assert values.isnan().tolist() == [False, False, True, False]
    assert values[3].item() == pytest.approx(0.5)  # of mean confidence, and no likelier than its rivals
    odds = (values / (1 - values)).log() - log_odds(margins, 2)
    torch.testing.assert_close(odds[:2], CONFIDENCE * torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(reward(margins, 2, torch.ones(4)), torch.sigmoid(log_odds(margins, 2)))
    alone = reward(margins[:, :0], 0, confidence[[0, 1, 3]].repeat(2)[:4])
    assert alone[0] < alone[2] < alone[1]  # without a rival it decides


def test_the_hardest_rivals_of_each_image():
    errors = torch.tensor([[5.0, 7, 4, 9, 6], [5.0, 1, 8, 3, 2]])[:, :, None].expand(2, 5, 2)
    evidence = Evidence(
        kinds=(ASKED, *[NEGATIVES] * 4), log_snr=torch.zeros(2), step=1.0, errors=errors, distances=errors + 1,
        dimensions=1,
    )  # fmt: skip
    places = hardest(evidence, 2)
    assert places.tolist() == [[0, 2, 4], [0, 1, 4]]
    chosen = evidence.at(places)
    assert chosen.kinds == (ASKED, CHOSEN, CHOSEN)
    assert chosen.errors[:, :, 0].tolist() == [[5, 4, 6], [5, 1, 2]]
    assert chosen.distances[:, :, 1].tolist() == [[6, 5, 7], [6, 2, 3]]
    assert hardest(evidence, 9).shape == (2, 5)


@pytest.fixture(params=["sd", "sd3"])
def model(request):
    extra = SD3_CALL if request.param == "sd3" else {}
    pipe = tiny_sd3() if request.param == "sd3" else tiny_sd()
    return Model(pipe, {"guidance_scale": 3.0, "num_inference_steps": 4, **extra}, request.param)


RIVALS = {
    NEGATIVES: ["a blue ball", "two red balls", "two balls", "a ball"],
    WIDER: ["a red cube", "two red cubes", "a blue cube", "two blue cubes"],
    NULL: [""],
}


def candidates_of(model, latents, online):
    return Candidates(
        model=model, prompt="a red ball", rivals=RIVALS, latents=latents, trace=None, online=online, keep=1, seed=0,
        batch_size=64,
    )  # fmt: skip


def test_paying_for_the_hardest_rivals_alone_changes_nothing(model):
    """As in the study, where all rivals and levels are known; and each candidate costs what the study says."""
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    latents[2] = 0
    free = {ONLINE: torch.tensor([-0.4, -0.2, math.nan, -0.3, -0.1])}
    evidence = gather(model, latents, "a red ball", RIVALS)
    spent = []
    for count in (5, 2):
        online = {ONLINE: free[ONLINE][:count]}
        with rows_counted(denoiser_of(model.pipe)) as rows:
            values = score_named("reward")(candidates_of(model, latents[:count], online))
        spent.append(sum(rows))
        torch.testing.assert_close(
            values, REWARD(online, gather(model, latents[:count], "a red ball", RIVALS)), equal_nan=True,
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert values.isfinite().tolist() == free[ONLINE][:count].isfinite().tolist()
    assert REWARD.calls(evidence) == 9 + 3 * (1 + HARDEST)
    assert spent[0] - spent[1] == 2 * 2 * REWARD.calls(evidence)  # of two more candidates, two rows a call


def test_variants_have_names_of_their_own_and_values_for_every_candidate(model):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    evidence = gather(model, latents, "a red ball", RIVALS)
    free = {name: torch.arange(4.0) for name in ("mi-tune", "self-confidence", ONLINE)}
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS:
        assert variant(free, evidence).isfinite().all(), variant.name
    assert [VARIANTS[0].calls(evidence), VARIANTS[3].calls(evidence)] == [0, 5]  # free; five prompts, ε and −ε
    assert (guarded(free, evidence) == 0).tolist()[0]


def test_figures_within_a_prompt():
    exact = np.array([1.0, 1, 0, 0, 1, 0])
    assert correlation(exact * 3 - 1, exact) == pytest.approx(1)
    assert math.isnan(correlation(np.ones(6), exact)) and math.isnan(correlation(exact, np.ones(6)))
    assert correlation(np.array([1.0, math.nan, 0, 0, 1, 0]), exact) == pytest.approx(1)
    assert discernment(np.array([3.0, 1, 1, 0, 2, 0]), exact) == pytest.approx((3 + 2.5 + 3) / 9)
    assert wrong_negatives(np.array([3.0, 1, 4, 0, 2, 5]), exact) == 0.5


def judged_prompts(count=4):
    exact = np.array([1.0, 0, 1, 0, 1, 0])
    return [
        Judged(
            model="m", guidance_scale=2.0, category="color" if prompt else "shape",
            exact=exact if prompt else np.ones(6), graded=exact / 2, calls={v.name: 1.0 for v in VARIANTS},
            values={v.name: exact + 0.1 * np.arange(6) for v in VARIANTS},
        )
        for prompt in range(count)
    ]  # fmt: skip


def test_the_page_has_each_variant_and_category():
    text = page_of(judged_prompts(), "mitune bench reward")
    rows = {row[0]: row for row in cells(text)}
    assert {variant.name for variant in VARIANTS} <= set(rows)
    assert rows["`reward`"][3].startswith("1.00 [") and rows["`reward`"][4].startswith("1.00 [")
    assert rows["shape"][1:3] == ["0 of 1", "1.00"] and set(rows["shape"][3:]) == {"–"}
    assert rows["color"][1:3] == ["3 of 3", "0.50"]
    assert "3 prompts have right ones and wrong ones" in text


def test_each_model_has_a_guidance_scale_of_its_own(capsys):
    app(["bench", "reward", "-m", "shapes-sd", "-m", "shapes-sd3", "--guidance-scale", "6"], standalone_mode=False)
    assert "--guidance-scale is given 1 times, for 2 of --model" in capsys.readouterr().err
