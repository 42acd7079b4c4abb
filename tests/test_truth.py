"""The true information against brute force, frequencies, and identities that any joint distribution has."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from mitune.information import Estimate
from mitune.worlds.shapes.grammar import CATEGORIES, COLORS, SHAPES, Phrase, Prompt, forms, parse, sample_prompt
from mitune.worlds.shapes.scene import KINDS, Object, log_likelihood, render, sample_scene
from mitune.worlds.shapes.truth import Truth, every_scene


@pytest.fixture(scope="module")
def truth():
    return Truth()


@pytest.fixture(scope="module")
def total(truth):
    return truth.mutual_information()


def pairs(count, seed=0):
    rng = random.Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    return [(sample_scene(prompt, rng), prompt) for prompt in prompts]


def test_prompts_add_up(truth):
    assert math.fsum(truth.probabilities.values()) == pytest.approx(1)
    # In two forms: 0.06 of the 175 single prompts, 0.07 of the 210 of one number.
    assert truth.probabilities[parse("a red circle")] == pytest.approx(0.06 / 175 + 0.07 / 210)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a plain circle",
        "three squares",
        "a circle, a cross and a square",
        "a red circle in front of a blue square",
        "a striped circle and a dotted square",
        "a circle to the left of a square",
    ],
)
def test_captions_by_brute_force(truth, text):
    """Every one of the 55,810 prompts is held against the scene."""
    scene = sample_scene(parse(text), random.Random(1))
    every = {c: math.log(p) + log_likelihood(scene, c) for c, p in truth.probabilities.items()}
    possible = {c: value for c, value in every.items() if value > -math.inf}
    assert truth.captions(scene) == possible
    assert parse(text) in possible
    assert truth.log_marginal(scene) == pytest.approx(np.logaddexp.reduce(list(possible.values())))


def test_captions_of_a_scene_add_up_to_one(truth):
    """Σ p(c | x) = 1, and Σ p(c | x) exp(−i(x; c)) = Σ p(c): both over the captions of x."""
    for scene, prompt in pairs(200):
        captions = truth.captions(scene)
        given = {c: math.exp(joint - truth.log_marginal(scene)) for c, joint in captions.items()}
        assert prompt in captions
        assert math.fsum(given.values()) == pytest.approx(1)
        back = math.fsum(p * math.exp(-truth.information(scene, c)) for c, p in given.items())
        assert back == pytest.approx(math.fsum(truth.probabilities[c] for c in captions))


def test_frequencies_of_pictures():
    """In a small world of four prompts, p(x) = Σ p(c) p(x | c) is how often each *picture* comes."""
    prompts = [parse(t) for t in ("a red circle", "a circle", "two red circles", "a red circle behind a blue square")]
    rng = random.Random(0)
    scenes = [sample_scene(prompts[rng.randrange(4)], rng) for _ in range(20_000)]
    seen, shown = Counter(), {}
    for scene in scenes:
        picture = render(scene).tobytes()
        seen[picture] += 1
        shown[picture] = scene
    expected = {
        picture: sum(math.exp(log_likelihood(scene, prompt)) for prompt in prompts) / 4
        for picture, scene in shown.items()
    }
    assert len(seen) == 16 * 6 + 120 + 48  # red circles are among the circles
    assert math.fsum(expected.values()) == pytest.approx(1)
    counts = np.array([seen[picture] for picture in expected])
    assert chisquare(counts, np.array(list(expected.values())) * len(scenes)).pvalue > 0.01


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("two red circles and a square", 120 * 14 * 6),
        ("a red circle and a blue square", 240),
        ("a circle behind a square", 48 * 30),
        ("a red circle to the left of a blue square", None),
        ("six red circles", 8008),
    ],
)
def test_every_scene(text, count):
    """Each picture once, and all that `log_likelihood` knows: together they have probability one."""
    prompt = parse(text)
    scenes = [frozenset((o, scene.index(o)) if "behind" in text else o for o in scene) for scene in every_scene(prompt)]
    likelihoods = [log_likelihood(scene, prompt) for scene in every_scene(prompt)]
    assert len(set(scenes)) == len(scenes) == (count or len(scenes))
    assert math.fsum(map(math.exp, likelihoods)) == pytest.approx(1)
    assert likelihoods == pytest.approx([-math.log(len(scenes))] * len(scenes))


def test_order_of_objects_does_not_count(truth):
    scene = sample_scene(parse("three red circles"), random.Random(0))
    other = sample_scene(parse("a striped circle above a dotted square"), random.Random(0))
    for each in (scene, other):
        values = [truth.log_marginal(order) for order in itertools.permutations(each)]
        assert values == pytest.approx([values[0]] * len(values))


def test_overlapping_objects_show_which_is_in_front():
    """No two scenes have one picture: of all overlaps of two kinds, each order looks different."""
    overlaps = [
        (Object(*a, 0, 0), Object(*b, 1, 0))
        for a, b in itertools.product(KINDS, KINDS)
        if a[0] != b[0] and a[1] != b[1] and a[0] in COLORS[:3] and b[0] in COLORS[:3]
    ]
    pictures = {render(order).tobytes() for pair in overlaps for order in (pair, pair[::-1])}
    assert len(pictures) == 2 * len(overlaps)


def test_by_hand(truth):
    """ "a circle" in red, at one of 16 places: p(x | p) = 1/96, and four captions."""
    scene = (Object("red", "circle", "plain", 0, 0),)
    captions = {"a circle": 96, "a plain circle": 96, "a red circle": 16, "a red plain circle": 16}
    single, number = 0.06 / 175, 0.07 / 210
    shares = {"a circle": single + number, "a plain circle": single, "a red circle": single + number}
    shares["a red plain circle"] = single
    marginal = sum(shares[text] / count for text, count in captions.items())
    assert truth.information(scene, parse("a circle")) == pytest.approx(-math.log(96 * marginal))
    assert truth.information(scene, parse("a red circle")) == pytest.approx(-math.log(16 * marginal))
    assert truth.information(scene, parse("a blue circle")) == -math.inf
    assert math.isnan(truth.information((*scene, *scene), parse("a blue circle")))


def test_exact_total_agrees_with_draws(truth, total):
    draws = torch.tensor([truth.information(scene, prompt) for scene, prompt in pairs(2000)])
    sampled = Estimate.of_mean(draws)
    assert sampled.standard_error < 0.06
    assert total == pytest.approx(sampled.value, abs=4 * sampled.standard_error)


@pytest.mark.parametrize("category", CATEGORIES)
def test_category_agrees_with_draws(truth, category):
    rng = random.Random(1)
    own = [form for form in forms() if form.category == category]
    chosen = rng.choices(own, weights=[form.weight for form in own], k=400)
    prompts = [rng.choice(form.prompts) for form in chosen]
    values = torch.tensor([truth.information(sample_scene(prompt, rng), prompt) for prompt in prompts])
    sampled = Estimate.of_mean(values)
    allowed = max(4 * sampled.standard_error, 1e-4)  # without a spread, the error is zero
    assert truth.mutual_information(category) == pytest.approx(sampled.value, abs=allowed)


def test_information_is_bounded(truth, total):
    """0 ≤ I(X; P) ≤ H(P)."""
    entropy = -math.fsum(p * math.log(p) for p in truth.probabilities.values())
    assert 0 < total < entropy


def test_emphasis_is_another_marginal(truth):
    """A category that is drawn more is less surprising: log p(x) rises there and falls elsewhere, by known amounts."""
    emphasized = Truth({"numeracy": 3.0})
    three, cross = Prompt((Phrase("circle", 3),)), parse("a red cross and a blue square")
    total = 1 + 2 * 0.12
    assert emphasized.probabilities[three] == pytest.approx(truth.probabilities[three] * 3 / total)
    scene = sample_scene(three, random.Random(0))
    change = emphasized.information(scene, three) - truth.information(scene, three)
    assert change == pytest.approx(-math.log(3 / total))
    scene = sample_scene(cross, random.Random(0))
    change = emphasized.information(scene, cross) - truth.information(scene, cross)
    assert change == pytest.approx(math.log(total))


def test_emphasis_by_relation_and_color(truth):
    emphasized = Truth({"2d_spatial": 2.0, "above": 3.0, "red first": 5.0})
    factors = {
        "a circle above a square": 6,
        "a circle below a square": 2,
        "a red circle above a blue square": 30,
        "a red circle and a blue square": 1,
    }
    changes = {t: emphasized.probabilities[parse(t)] / truth.probabilities[parse(t)] for t in factors}
    scale = changes["a red circle and a blue square"]
    assert {t: change / scale for t, change in changes.items()} == pytest.approx(factors)
    with pytest.raises(ValueError, match="without an emphasis"):
        emphasized.mutual_information()


def test_names_do_not_matter(truth):
    """Renaming shapes and colors, which the exact total rests on, leaves the information as it is."""
    shapes = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True))
    colors = dict(zip(COLORS, COLORS[2:] + COLORS[:2], strict=True))
    for scene, prompt in pairs(100, seed=2):
        phrases = (
            Phrase(shapes[p.shape], p.count, colors[p.color] if p.color else None, p.texture) for p in prompt.phrases
        )
        other = tuple(Object(colors[o.color], shapes[o.shape], o.texture, o.x, o.y) for o in scene)
        renamed = truth.information(other, Prompt(tuple(phrases), prompt.relation))
        assert renamed == pytest.approx(truth.information(scene, prompt))
