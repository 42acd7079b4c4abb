"""Racing: candidates that cannot win by their score so far are dropped mid-way, as in successive halving.

A schedule is a list of rungs (a, b): after the share a of a run's steps, the share b of a prompt's candidates stays.
((0.25, 0.5), (0.5, 0.25)) costs 0.25 · 1 + 0.25 · 0.5 + 0.5 · 0.25 = 0.5 of all denoiser calls. Those that stay come
out as they would have without a race; what may change is which ones stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mitune.config.schema import GRADUAL, PoolConfig, Rungs
from mitune.denoiser.probe import MIProbe
from mitune.errors import MituneError
from mitune.information import SCORES
from mitune.pool.scores import PoolScore
from mitune.pool.selection import Rule, select

SAFE = "self-confidence"  # the score that a race loses least of: docs/racing.md
GROUP = 8  # denoiser batches that the candidates of one call of the pipeline may fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """A schedule, and what decides who stays."""

    rungs: Rungs  # as in PoolConfig.race
    scores: tuple[str, ...]  # on-line ones; each keeps its own best
    candidates: int  # M
    keep: int  # how many stay at least

    def stay(self, step: int, steps: int) -> int | None:
        """How many of a prompt's candidates stay by each score after `step` of `steps`; None where there is no rung."""
        shares = [share for after, share in self.rungs if math.ceil(after * steps) == step < steps]
        return max(self.keep, math.ceil(min(shares) * self.candidates)) if shares else None

    def drop(self, probe: MIProbe) -> None:
        """Has the probe keep those that stay, if the step that it has just seen is a rung."""
        stay = self.stay(probe.steps, probe.planned_steps)
        if stay is not None:
            trace = probe.trace_so_far()
            scores = {name: SCORES[name].values(trace).tolist() for name in self.scores}
            probe.keep(self.survivors(probe.candidates, scores, stay))

    def survivors(self, places: Sequence[int], scores: Mapping[str, Sequence[float]], stay: int) -> list[int]:
        """Which of the candidates at `places`, M a prompt in turn, are among a prompt's `stay` best by some score.

        scores: so far, one value a place. Where a score has no value yet for any candidate of a prompt, all stay.
        Returns their positions in `places`.
        """
        kept: set[int] = set()
        for prompt in {place // self.candidates for place in places}:
            group = [at for at, place in enumerate(places) if place // self.candidates == prompt]
            for values in scores.values():
                best = select([values[at] for at in group], stay)
                kept |= {group[at] for at in best} or set(group)
        return sorted(kept)

    def running(self, steps: int) -> list[int]:
        """How many candidates of a prompt each of the steps is made for, where one score decides."""
        counts = [self.candidates]
        for step in range(1, steps):
            counts.append(min(counts[-1], self.stay(step, steps) or counts[-1]))
        return counts

    def prompts_together(self, steps: int, batch_size: int) -> int:
        """With how many prompts in one call of the pipeline the least of the denoiser's batches is filled up."""
        running = self.running(steps)

        def filled(prompts: int) -> float:
            batches = sum(math.ceil(prompts * count / batch_size) for count in running)
            return batches * batch_size / prompts

        return min(range(1, max(1, GROUP * batch_size // self.candidates) + 1), key=filled)


def race_of(config: PoolConfig, rules: Sequence[Rule], scores: Mapping[str, PoolScore]) -> Race | None:
    """The race by the rungs of `config.race`, if it is "auto" only where self-confidence decides; None without one.

    scores: those that the rules name, without the controls. Raises MituneError for a ranked set, and for a rule that
    needs all candidates finished: a control, a quantile, a score that does not go with an on-line one.
    """
    online = {rule: scores[rule.by].online for rule in rules if rule.by in scores and rule.quantile is None}
    rungs = config.race
    if rungs == "auto":
        rungs = GRADUAL if not config.ranked and all(online.get(rule) == SAFE for rule in rules) else "off"
    if rungs == "off":
        return None
    if config.ranked:
        raise MituneError(
            "pool.race drops candidates half-way, but a ranked set needs the worst of them finished as well; set "
            "pool.race=off (--no-race), or take an objective that learns from what is kept alone."
        )
    for rule in rules:
        if online.get(rule) is None:
            raise MituneError(
                f"pool.race drops candidates half-way, but pool.select names {rule.slug!r}, which needs all of them "
                "finished; leave that out, or set pool.race=off (--no-race)."
            )
    staged = any(not scores[rule.by].is_online for rule in rules)
    return Race(
        rungs=rungs,
        scores=tuple(dict.fromkeys(filter(None, online.values()))),
        candidates=config.candidates,
        keep=2 * config.keep if staged else config.keep,  # a second stage needs a choice
    )
