"""The accounting of the gap: exact with an exact denoiser, and of the very numbers that `scoring.score` gives."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Generator

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.path import path_of
from mitune.denoiser.pictures import encode_images
from mitune.errors import MituneError
from mitune.evaluation.statistics import kendall_tau, spearman
from mitune.information import Estimate, LogisticProposal, alpha_sigma, point_wise_draws, true_noise
from mitune.scoring import default_proposal, score
from mitune.worlds.shapes import truth_study as truth
from mitune.worlds.shapes import truth_tables
from mitune.worlds.shapes.grammar import COLORS, SHAPES, TEXTURES, parse
from mitune.worlds.shapes.scene import picture, sample_scene
from mitune.worlds.shapes.truth import Truth
from mitune.worlds.shapes.truth_losses import SPLIT, estimates_of
from mitune.worlds.shapes.truth_study import ASKED, CAPTION, UNRELATED, noisy_end, study
from mitune.worlds.shapes.truth_tables import calibration_figure, correlation, tables_of


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(name="shapes-sd"))


class Exact:
    """ε̂ = E[ε | z] where z₀ is one of K equally likely latents, (K, D)."""

    def __init__(self, known):
        self.known = known

    def __call__(self, noisy, log_snr):
        alpha, sigma = (x.float() for x in alpha_sigma(log_snr, is_flow=False))
        distance = torch.cdist(noisy.flatten(1), alpha * self.known) ** 2
        clean = torch.softmax(-distance / (2 * sigma**2), dim=1) @ self.known
        return (noisy - alpha * clean.view_as(noisy)) / sigma


@pytest.mark.parametrize("low", [-6.0, -3.0])
def test_loss_of_the_exact_denoiser(low):
    """Equation (2) with E = 0: ½ ∫ ‖ε̂ − ε‖² dλ = log K − N for each z₀, wherever the range begins."""
    generator = Generator().manual_seed(0)
    known = torch.randn(12, 8, generator=generator)
    z0 = known.view(12, 8, 1, 1)
    exact = Exact(known)

    def against_noise(noisy, log_snr):
        alpha, sigma = (x.float() for x in alpha_sigma(log_snr, is_flow=False))
        return true_noise(noisy, z0, alpha, sigma), exact(noisy, log_snr)

    draws = point_wise_draws(
        against_noise,
        z0,
        estimator="standard",
        proposal=LogisticProposal(low, 6.0),
        strata=1000,
        generator=generator,
        is_flow=False,
    )
    ends = torch.tensor([[noisy_end(z, z0, low, is_flow=False, seed=seed) for z in z0] for seed in range(100)])
    losses = [Estimate.of_strata(row) for row in draws]
    for loss, end in zip(losses, ends.T, strict=True):
        error = math.hypot(loss.standard_error, Estimate.of_mean(end).standard_error)
        assert error < 0.15
        assert loss.value == pytest.approx(math.log(12) - end.mean().item(), abs=4 * error)
    assert ends.mean() > (0.005 if low == -6.0 else 0.1)


def test_losses_are_the_scores(model):
    """L(∅) − L(p), the orthogonal estimate and the confidence are those of `score` with the same draws."""
    rng = random.Random(0)
    prompts = ["a red circle and a blue square", "a circle and a square"]
    latents = encode_images(model.pipe, [picture(sample_scene(parse(prompts[0]), rng))])
    estimates = estimates_of(model, latents, prompts, draws=8, seed=3)
    kwargs = {"draws": 8, "seed": 3, "call": model.call}
    kwargs["proposal"] = default_proposal(path_of(model.pipe.scheduler), "self-confidence")  # that of the study
    for found, estimator in (
        (estimates.loss[0] - estimates.loss[1:], "standard"),
        (estimates.orthogonal[1:], "orthogonal"),
        (estimates.confidence[1:], "self-confidence"),
    ):
        scores = score(model.pipe, latents.expand(2, -1, -1, -1), prompts, estimator=estimator, **kwargs)
        expected = [estimate.value for estimate in scores.estimates]
        assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_scenes_are_told_apart_at_the_split(model):
    """Two latents at distance d are told apart, at √SNR · d/2 standard deviations, by more than 5: so beyond `SPLIT`
    there is no information left in truth."""
    crossed = sample_scene(parse("a red circle in front of a blue square"), random.Random(0))
    first, second = sample_scene(parse("a striped diamond and a plain cross"), random.Random(0))
    scenes = [crossed, crossed[::-1], (first, second)]
    scenes += [(replace(first, color=color), second) for color in COLORS if color != first.color]
    scenes += [(replace(first, shape=shape), second) for shape in SHAPES if shape not in (first.shape, "cross")]
    scenes += [(replace(first, texture=texture), second) for texture in TEXTURES if texture != first.texture]
    latents = encode_images(model.pipe, [picture(scene) for scene in scenes]).flatten(1)
    assert math.exp(SPLIT / 2) * torch.pdist(latents).min().item() / 2 > 5


@pytest.fixture(scope="module")
def small(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth, "WORLD_SCENES", 64)
        yield truth.study(model, scenes=2, categories=("numeracy", "2d_spatial"), draws=4)


def test_terms_add_up(small):
    for gap in small.gaps:
        total = gap.truth + gap.noisy_end + gap.conditional + gap.emphasis + gap.null
        assert total == pytest.approx(gap.standard, abs=1e-3)
        assert abs(gap.noisy_end) < gap.truth


def test_every_scene_has_its_prompts(small):
    for scene in range(4):
        pairs = [pair for pair in small.pairs if pair.scene == scene]
        kinds = [pair.kind for pair in pairs]
        assert kinds.count(ASKED) == kinds.count(UNRELATED) == 1
        assert kinds[0] == ASKED
        assert {"count changed", "relation turned"} & set(kinds)
        for pair in pairs:
            assert (pair.truth > -math.inf) == (pair.kind in (ASKED, CAPTION))
        # As for the truth: Σ p(c) exp(i) = 1 over the captions.
        captions = [pair for pair in pairs if pair.kind in (ASKED, CAPTION)]
        shares = [Truth().probabilities[parse(p.prompt)] * math.exp(p.estimates["mixture"]) for p in captions]
        assert math.fsum(shares) == pytest.approx(1)


def test_tables_and_plot(small, monkeypatch):
    monkeypatch.setattr(truth_tables, "RESAMPLES", 10)
    text = tables_of(small, "truth.png")
    assert all(f"| {name} " in text for name in ("numeracy", "2d_spatial", "all", "unrelated"))
    assert calibration_figure(small).startswith(b"\x89PNG")


def test_correlation_of_perfect_estimates():
    pairs = [(np.array([0.0, 1.0 + i]), np.array([0.0, 2.0 + i])) for i in range(5)]
    assert correlation(pairs, spearman).value == pytest.approx(1)
    assert correlation([(x, -y) for x, y in pairs], kendall_tau).value == pytest.approx(-1)
    constant = [(np.zeros(2), np.arange(2.0))] * 3
    nothing = correlation(constant, spearman)
    assert all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))


def test_draws_must_fit(model):
    with pytest.raises(MituneError, match="multiple of 4"):
        study(model, scenes=1, draws=6)


def test_emphasis_is_read(tmp_path):
    """Of the last phase; a folder without a record of its training has none."""
    assert truth.training_emphasis(str(tmp_path)) == {}
    phases = [{"emphasis": {"color": 2.0}}, {"emphasis": {"numeracy": 3.0}}]
    (tmp_path / "training.json").write_text(json.dumps({"denoiser": phases}))
    assert truth.training_emphasis(str(tmp_path)) == {"numeracy": 3.0}
