"""The study's variants read and pay for what they need alone, and combine scores as they say."""

import math

import pytest
import torch

from mitune.bench.variants import BANDS, COMBINATIONS, CONTRASTS, Combination, two_stage
from mitune.information.contrast import ALL, ASKED, Contrast, smallest_margin
from mitune.pool.scores import TwoStages
from mitune.pool.selection import mean_rank
from mitune.prompts.rivals import NEGATIVES, NULL, OTHERS, WORDS
from tests.test_contrast import KINDS, MEANS, gaussian_evidence


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
    staged = Combination("staged", TwoStages("self-confidence", contrast, 0.2), "two stages")
    assert staged.calls(evidence) == pytest.approx(0.2 * 2 * 3 * 8)
    assert set(staged(free, evidence).argsort(descending=True)[:2].tolist()) == {8, 9}
    ranked = Combination("ranked", TwoStages("self-confidence", contrast), "mean rank")
    assert ranked.calls(evidence) == 2 * 3 * 8
    torch.testing.assert_close(ranked(free, evidence), mean_rank(free["self-confidence"], contrast(evidence)))


def test_at_the_ceiling_the_free_score_decides():
    ceiling = torch.tensor([1.0, 0.5, 1.0])
    assert two_stage(torch.tensor([1.0, 2.0, 3.0]), ceiling, 3).tolist() == [2.0, 1.0, 3.0]
    assert COMBINATIONS["contrast"].stages.count(50) == 13
