"""Margins and divergences have their known values where the denoiser is exact."""

import math

import pytest
import torch

from mitune.information import alpha_sigma
from mitune.information.contrast import (
    ASKED,
    Contrast,
    Evidence,
    capped_margin,
    fits,
    mean_normalized_margin,
    normalized_margin,
    point_wise_information,
    smallest_margin,
    standardized_margin,
)
from mitune.prompts.rivals import NEGATIVES


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
    assert Contrast("normalized", "m/D", normalized_margin, (NEGATIVES,))(same).isnan().all()


def test_a_margin_ends_at_the_ceiling():
    """Three images with m/D = 3, 0.5 and 1.2 against their hardest rival."""
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
