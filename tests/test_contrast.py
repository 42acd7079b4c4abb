"""Margins and divergences have their known values where the denoiser is exact, and are the denoiser's own elsewhere."""

import math

import pyarrow.parquet as pq
import pytest
import torch

from mitune.config.schema import PoolConfig
from mitune.denoiser.opening.models import Model
from mitune.denoiser.path import path_of
from mitune.denoiser.sampling import condition
from mitune.information.contrast import (
    ALL,
    ASKED,
    BANDS,
    COMBINATIONS,
    CONTRASTS,
    LOG_SNR_RANGE,
    NEGATIVES,
    NULL,
    OTHERS,
    WIDER,
    WORDS,
    Combination,
    Contrast,
    Evidence,
    capped_margin,
    fits,
    gather,
    mean_normalized_margin,
    mean_rank,
    normalized_margin,
    point_wise_information,
    post_hoc,
    smallest_margin,
    standardized_margin,
    told_apart,
    two_stage,
    words_left_out,
)
from mitune.information.core import alpha_sigma
from mitune.pool.build import build_pool
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3


def gaussian_evidence(means: torch.Tensor, kinds: tuple[str, ...], samples: int, source: int, draws=64) -> Evidence:
    """Of `samples` from N(means[source], I) in d dimensions, under P prompts that say N(means[p], I), VP path.

    There ε̂(z | p) = σ (z − α μ_p), since α² + σ² = 1.
    """
    generator = torch.Generator().manual_seed(0)
    dimensions = means.shape[1]
    z0 = means[source] + torch.randn(samples, dimensions, generator=generator, dtype=torch.float64)
    step = 40 / draws
    log_snr = -20 + step * (torch.arange(draws, dtype=torch.float64) + 0.5)
    errors, distances = [], []
    for level in log_snr:
        alpha, sigma = alpha_sigma(level, is_flow=False)
        noise = torch.randn(dimensions, generator=generator, dtype=torch.float64)
        pair = []
        for epsilon in (noise, -noise):
            noisy = alpha * z0 + sigma * epsilon
            predicted = sigma * (noisy[:, None] - alpha * means)
            error = (predicted - epsilon).square().sum(dim=2)
            pair.append(torch.stack([error, (predicted - predicted[:, :1]).square().sum(dim=2)]))
        error, distance = sum(pair) / 2
        errors.append(error)
        distances.append(distance)
    return Evidence(
        kinds=kinds,
        log_snr=log_snr,
        step=step,
        errors=torch.stack(errors, dim=2),
        distances=torch.stack(distances, dim=2),
        dimensions=dimensions,
    )


MEANS = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
KINDS = (ASKED, NEGATIVES, NEGATIVES)


def test_margin_is_the_log_likelihood_ratio():
    """N(0, I) against N(μ, I): D = ‖μ‖²/2, and m(z₀) = ‖μ‖²/2 − z₀·μ = log p(z₀ | p) − log p(z₀ | p′).

    The noise that antithetic pairs leave is none: here margins are linear in ε.
    """
    evidence = gaussian_evidence(MEANS, KINDS, samples=5, source=0)
    z0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = MEANS[1:].square().sum(dim=1) / 2 - z0 @ MEANS[1:].T
    torch.testing.assert_close(evidence.margins, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        evidence.divergences, torch.tensor([[4.5, 0.5]]).double().expand(5, 2), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(smallest_margin(evidence), exact.amin(dim=1), rtol=1e-3, atol=1e-3)
    information = -torch.exp(-exact).mean(dim=1).log()
    torch.testing.assert_close(point_wise_information(evidence), information, rtol=1e-2, atol=1e-3)


def test_normalized_margin_says_whose_sample_it_is():
    """Mean +1 on samples of the prompt and −1 on those of the rival; m/√2D has standard deviation 1 around √(D/2)."""
    own = gaussian_evidence(MEANS[:2], KINDS[:2], samples=4000, source=0)
    other = gaussian_evidence(MEANS[:2], KINDS[:2], samples=4000, source=1)
    deviation = 1 / math.sqrt(4.5 / 2)
    assert normalized_margin(own).mean().item() == pytest.approx(1, abs=4 * deviation / math.sqrt(4000))
    assert normalized_margin(other).mean().item() == pytest.approx(-1, abs=4 * deviation / math.sqrt(4000))
    assert standardized_margin(own).std().item() == pytest.approx(1, abs=0.05)


def test_scores_read_only_what_they_need():
    """A score is the same whatever else the evidence holds, costs what it needs, and is NaN without its rivals."""
    kinds = (ASKED, NEGATIVES, NEGATIVES, OTHERS, WORDS, NULL)
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    evidence = gaussian_evidence(means, kinds, samples=3, source=0, draws=8)
    for contrast in CONTRASTS.values():
        needed = contrast.needs(evidence)
        assert set(needed.kinds) <= {ASKED, *contrast.rivals}
        torch.testing.assert_close(contrast(evidence), contrast.function(needed))
    assert evidence.calls == 2 * 6 * 8
    assert CONTRASTS["margin-negatives"].needs(evidence).calls == 2 * 3 * 8
    assert CONTRASTS["margin-negatives-sparse"].needs(evidence).calls == 2 * 3 * 4
    assert CONTRASTS["confidence"].needs(evidence).calls == 2 * 8
    assert CONTRASTS["margin-words"](evidence.against(NEGATIVES)).isnan().all()


def test_what_fits_beats_all_rivals_and_is_not_among_the_least_likely():
    errors = torch.tensor([[float(i), 10.0, 10.0] for i in range(10)])  # one after the other less likely
    errors[[2, 9], 2] = 0.0  # these lose against a rival
    errors[4] = math.nan
    evidence = Evidence(
        kinds=KINDS, log_snr=torch.zeros(1), step=1.0, errors=errors[..., None], distances=torch.ones(10, 3, 1),
        dimensions=1,
    )  # fmt: skip
    expected = torch.tensor([1, 1, 0, 1, math.nan, 1, 1, 1, 1, -1], dtype=torch.float64)
    torch.testing.assert_close(fits(evidence), expected, equal_nan=True)


def test_a_rival_that_reads_the_same_does_not_count():
    twice = gaussian_evidence(MEANS[[0, 1, 0]], KINDS, samples=5, source=0)
    once = gaussian_evidence(MEANS[:2], KINDS[:2], samples=5, source=0)
    for score in (normalized_margin, standardized_margin, mean_normalized_margin):
        torch.testing.assert_close(score(twice), score(once))
    same = gaussian_evidence(MEANS[[0, 0]], KINDS[:2], samples=5, source=0)
    assert CONTRASTS["normalized-negatives"](same).isnan().all()


def test_bands_cover_the_range():
    evidence = gaussian_evidence(MEANS, KINDS, samples=2, source=0, draws=16)
    evidence = ALL.of(evidence)
    early, late = BANDS["early"].of(evidence), BANDS["late"].of(evidence)
    torch.testing.assert_close(early.margins + late.margins, evidence.margins)
    assert BANDS["below-0"].of(evidence).log_snr.max() < 0
    assert [len(BANDS[name].places(torch.arange(-4.5625, 2, 0.875))) for name in ("middle", "single")] == [3, 1]
    assert BANDS["sparse"].of(evidence).step == 2 * evidence.step


def test_two_scores_together():
    free, decisive = torch.tensor([0.9, 0.8, 0.1, 0.2]), torch.tensor([1.0, 2.0, 9.0, 8.0])
    assert mean_rank(free, decisive).tolist() == [2.5, 2.5, 2.5, 2.5]
    assert two_stage(free, decisive, keep=2).tolist() == [3, 4, 1, 2]
    assert two_stage(free, decisive, keep=4).argsort(descending=True).tolist() == [2, 3, 1, 0]
    assert two_stage(free, torch.tensor([math.nan, math.nan, 9.0, 8.0]), keep=3).tolist() == [3, 2, 1, 4]


def test_a_combination_pays_for_those_it_keeps():
    evidence = gaussian_evidence(MEANS, KINDS, samples=10, source=0, draws=8)
    contrast = Contrast("margin", "min m", smallest_margin, (NEGATIVES,))
    free = {"self-confidence": torch.arange(10.0)}
    staged = Combination("staged", "self-confidence", contrast, "two stages", share=0.2)
    assert staged.calls(evidence) == pytest.approx(0.2 * 2 * 3 * 8)
    assert set(staged(free, evidence).argsort(descending=True)[:2].tolist()) == {8, 9}
    ranked = Combination("ranked", "self-confidence", contrast, "mean rank")
    assert ranked.calls(evidence) == 2 * 3 * 8
    torch.testing.assert_close(ranked(free, evidence), mean_rank(free["self-confidence"], contrast(evidence)))


def test_words_left_out():
    assert words_left_out("a red circle and a square") == [
        "a circle and a square",
        "a red and a square",
        "a red circle and a",
    ]
    assert words_left_out("a") == []


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
                predicted = model.pipe.unet(noisy, t, known["encoder_hidden_states"]).sample
            else:
                velocity = model.pipe.transformer(
                    noisy, known["encoder_hidden_states"], known["pooled_projections"], t.expand(2)
                ).sample
                predicted = noisy + alpha * velocity  # v = ε − z₀
        errors.append(((predicted - epsilon) ** 2).sum(dim=(1, 2, 3)))
        distances.append(((predicted[1] - predicted[0]) ** 2).sum())
    torch.testing.assert_close(evidence.errors[0, :2, 0], sum(errors) / 2, rtol=1e-4, atol=1e-3)
    assert evidence.distances[0, 1, 0].item() == pytest.approx(sum(distances).item() / 2, rel=1e-3)
    assert not evidence.distances[:, 0].any()
    alone = gather(model, latents[2:], "a red ball", rivals, draws=3, seed=5, batch_size=1)
    torch.testing.assert_close(evidence.errors[2:], alone.errors, rtol=1e-4, atol=1e-3)


def test_told_apart_follows_the_margins(model):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    prompts = ["a red ball", "two blue cubes", "a red ball"]
    rivals = {"a red ball": ["a blue ball", "two red cubes"], "two blue cubes": ["a cube"]}
    told = told_apart(model, latents, prompts, rivals, draws=2)
    assert [len(each) for each in told] == [2, 1, 2]
    evidence = gather(model, latents[[0, 2]], "a red ball", {NEGATIVES: rivals["a red ball"]}, draws=2)
    assert [told[0], told[2]] == (evidence.margins > 0).tolist()


def test_a_score_in_a_run_is_that_of_the_study(model):
    """Paying for the needed prompts, levels and candidates alone changes nothing."""
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    rivals = {NEGATIVES: ["a blue ball", "two red cubes"], WIDER: ["two red balls"], WORDS: ["a ball"]}
    free = {"self-confidence": torch.arange(7.0)}
    evidence = gather(model, latents, "a red ball", rivals)
    for name in ("margin-negatives-sparse", "normalized-wide", "information-words", "confidence-early"):
        torch.testing.assert_close(
            post_hoc(name, model, latents, "a red ball", rivals, free), CONTRASTS[name](evidence), rtol=1e-3, atol=1e-4
        )
    ranked = post_hoc("ranks-margin-negatives", model, latents, "a red ball", rivals, free)
    torch.testing.assert_close(ranked, COMBINATIONS["ranks-margin-negatives"](free, evidence))
    staged = post_hoc("stages-margin-negatives", model, latents, "a red ball", rivals, free)
    assert staged.isfinite().nonzero().flatten().tolist() == [5, 6]
    two = post_hoc("stages-margin-negatives", model, latents, "a red ball", rivals, free, keep=2)
    assert two.isfinite().nonzero().flatten().tolist() == [3, 4, 5, 6]  # two for each that will be picked
    whole = COMBINATIONS["stages-margin-negatives"](free, evidence)
    assert staged.nan_to_num(-math.inf).argmax() == whole.argmax()


def test_above_the_ceiling_the_free_score_decides():
    """Three images with m/D = 3, 0.5 and 1.2 against their hardest rival, the last being the most self-confident."""
    ratios = torch.tensor([[3.0, 5.0], [0.5, 9.0], [1.2, 1.1]])
    errors = torch.cat([torch.zeros(3, 1), 2 * ratios], dim=1).unsqueeze(2)
    distances = torch.tensor([0.0, 2.0, 2.0]).expand(3, 3).unsqueeze(2)
    evidence = Evidence(
        kinds=(ASKED, NEGATIVES, NEGATIVES), log_snr=torch.zeros(1), step=1.0, errors=errors, distances=distances,
        dimensions=1,
    )  # fmt: skip
    torch.testing.assert_close(normalized_margin(evidence), torch.tensor([3.0, 0.5, 1.1], dtype=torch.float64))
    capped = capped_margin(evidence)
    torch.testing.assert_close(capped, torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64))
    assert two_stage(torch.tensor([1.0, 2.0, 3.0]), capped, 3).tolist() == [2.0, 1.0, 3.0]


def test_without_rivals_the_free_score_decides_in_two_stages(model):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    free = {"self-confidence": torch.tensor([0.1, 0.4, float("nan"), 0.3, 0.2])}
    alone = post_hoc("contrast", model, latents, "thoughts", {NEGATIVES: []}, free)
    torch.testing.assert_close(alone, free["self-confidence"].double(), equal_nan=True)
    assert post_hoc("normalized-negatives", model, latents, "thoughts", {NEGATIVES: []}, free).isnan().all()


def test_a_pool_selects_by_contrast(model, tmp_path):
    """The kept candidates are the best by the score's own column; in two stages, among those that were paid for."""
    names = ("normalized-wide", "stages-margin-negatives")
    config = PoolConfig(candidates=8, keep=1, select=names, batch_size=8)
    rows = pq.read_table(build_pool(model, ["a circle and a square"], tmp_path / "pool", config).table).to_pydict()
    for name, paid in zip(names, (8, 2), strict=True):
        values = torch.tensor(rows[f"score.{name}"])
        assert values.isfinite().sum() == paid
        assert rows[f"kept.{name}"].index(True) == values.nan_to_num(-math.inf).argmax()
