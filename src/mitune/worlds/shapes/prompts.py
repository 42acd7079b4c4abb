"""Prompt lists of the shapes world: for each category one to fine-tune on and one to judge by.

As in T2I-CompBench, the held-out prompts are half *seen* (built of combinations that the training prompts use as well)
and half *unseen* (with at least one combination, such as purple + cross, that no training prompt of the category has).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache

from mitune.worlds.base import Listed
from mitune.worlds.shapes.grammar import CATEGORIES, Prompt, forms

TRAIN, HELD_OUT = 48, 20  # prompts a category; the second number is for seen and unseen each
UNSEEN_SHARE = 0.2  # of a category's combinations


def combinations(prompt: Prompt, category: str) -> Iterator[tuple[str, ...]]:
    """What a category wants combined: attribute and shape, or the shapes that stand together."""
    if prompt.relation and category != "complex":
        yield prompt.relation, prompt.phrases[0].shape, prompt.phrases[1].shape
    elif category == "shape":
        yield from itertools.combinations(sorted(phrase.shape for phrase in prompt.phrases), 2)
    else:
        attribute = {"texture": "texture", "numeracy": "count"}.get(category, "color")
        yield from ((str(getattr(phrase, attribute)), phrase.shape) for phrase in prompt.phrases)


def _in_range(prompt: Prompt, category: str) -> bool:
    """Counts: two to five of one kind, up to three of each of two kinds; the world itself goes on to six and four."""
    counts = [phrase.count for phrase in prompt.phrases]
    return category != "numeracy" or (2 <= counts[0] <= 5 if len(counts) == 1 else max(counts) <= 3)


@cache
def prompt_list(category: str) -> tuple[Listed, ...]:
    """All lists of a category, one after the other: train, seen, unseen."""
    rng = random.Random(f"mitune {category}")
    chosen_forms = [form for form in forms() if form.category == category]
    prompts = [p for form in chosen_forms for p in rng.sample(form.prompts, min(len(form.prompts), 600))]
    prompts = [p for p in prompts if _in_range(p, category)]
    rng.shuffle(prompts)
    known = sorted({pair for prompt in prompts for pair in combinations(prompt, category)})
    unseen = set(rng.sample(known, max(1, round(UNSEEN_SHARE * len(known)))))
    held = [str(p) for p in prompts if unseen & set(combinations(p, category))][:HELD_OUT]
    open_ = [str(p) for p in prompts if not unseen & set(combinations(p, category))][: TRAIN + HELD_OUT]
    train, seen = open_[HELD_OUT:], open_[:HELD_OUT]
    splits = {"train": train, "seen": seen, "unseen": held}
    return tuple(Listed(text, category, split) for split, texts in splits.items() for text in texts)


def shapes_prompts(name: str) -> list[Listed]:
    """The list called "train" or "heldout", of all categories, or of one: "train/color". KeyError for another name."""
    split, _, category = name.partition("/")
    wanted = {"train": ("train",), "heldout": ("seen", "unseen")}[split]
    if category and category not in CATEGORIES:
        raise KeyError(category)
    return [
        listed
        for each in ((category,) if category else CATEGORIES)
        for listed in prompt_list(each)
        if listed.split in wanted
    ]
