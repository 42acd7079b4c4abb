"""Rivals of a prompt, by kind: other prompts that an image must not fit better than its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mitune.denoiser.opening.models import Model
from mitune.denoiser.reading import cut_texts
from mitune.prompts.negatives import hard_negatives, wider_negatives
from mitune.worlds.base import Negative

Rivals = Mapping[str, Sequence[str]]  # texts by kind

KINDS = NEGATIVES, WIDER, OTHERS, WORDS, NULL = "negatives", "wider", "others", "words", "null"
OTHER_PROMPTS = 5  # of the run that are rivals
_UNSAID = {"a", "an", "the", "and", "or", "of", "in", "on", "to", "at", "by", "with", "from", "is", "are", "its"}


def rivals_of(
    prompt: str, prompts: Sequence[str], *, seed: int = 0, negatives: Mapping[str, Sequence[Negative]] | None = None
) -> dict[str, list[str]]:
    """All rivals of a prompt: its hard negatives, those that ask for more or for something else, other prompts of the
    run, itself without a word, and the empty one.

    prompts: of the run, out of which a lot that depends on seed and prompt draws. negatives: the user's own, as
    `load_negatives` reads them.
    """
    others = [other for other in prompts if other != prompt]
    lot = random.Random(f"{seed} {prompt}")
    return {
        NEGATIVES: [negative.prompt for negative in hard_negatives(prompt, negatives)],
        WIDER: [negative.prompt for negative in wider_negatives(prompt, negatives)],
        OTHERS: lot.sample(others, min(OTHER_PROMPTS, len(others))),
        WORDS: words_left_out(prompt),
        NULL: [""],
    }


def words_left_out(prompt: str) -> list[str]:
    """The prompt without one of its words, for each word that says something; in order, without repeats."""
    words = prompt.split()
    telling = [i for i, word in enumerate(words) if word.strip(",.").lower() not in _UNSAID]
    shorter = [" ".join(words[:i] + words[i + 1 :]) for i in telling]
    return [text for text in dict.fromkeys(shorter) if text]


def read_whole(model: Model, rivals: Rivals) -> dict[str, list[str]]:
    """The rivals without those that a call of the model would cut: made of a long prompt, they may be longer still."""
    cut = cut_texts(model.pipe, [text for kind in rivals for text in rivals[kind]], model.call)
    return {kind: [text for text in texts if text not in cut] for kind, texts in rivals.items()}
