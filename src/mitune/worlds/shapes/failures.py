"""How an image of the shapes world misses its prompt."""

from __future__ import annotations

from mitune.evaluation.metrics.base import BOUND, MALFORMED, PLACED, TOO_LITTLE, TOO_MUCH
from mitune.worlds.shapes.grammar import Prompt
from mitune.worlds.shapes.judge import Verdict


def failures_of(verdict: Verdict, prompt: Prompt) -> set[str]:
    """How an image misses its prompt; empty where it is exactly right.

    Too much: an object that nobody asked for, or too many of one. Too little: too few of one. Bound: an object is
    there without its color or texture. Placed: the two objects are there, but not as the relation says. A malformed
    drawing says nothing about meaning and is only that.
    """
    if verdict.malformed:
        return {MALFORMED}
    failures = set()
    wanted = {phrase.shape: phrase.count for phrase in prompt.phrases}
    drawn = {shape: sum(o.shape == shape for o in verdict.scene) for shape in wanted}
    if any(o.shape not in wanted for o in verdict.scene) or any(drawn[s] > wanted[s] for s in wanted):
        failures.add(TOO_MUCH)
    if any(drawn[s] < wanted[s] for s in wanted):
        failures.add(TOO_LITTLE)
    for phrase in prompt.phrases:
        objects = [o for o in verdict.scene if o.shape == phrase.shape]
        if any(phrase.color not in (None, o.color) or phrase.texture not in (None, o.texture) for o in objects):
            failures.add(BOUND)
    first_two = [phrase.shape for phrase in prompt.phrases[:2]]
    if prompt.relation and all(drawn[shape] == 1 for shape in first_two):
        placed = f"{first_two[0]} {prompt.relation} {first_two[1]}"
        if placed in verdict.missed:
            failures.add(PLACED)
    return failures
