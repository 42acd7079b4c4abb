"""The phases that the embedded denoisers were trained in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserConfig:
    """A phase in the training of one base model and its text encoders: float32 weights, bfloat16 arithmetic."""

    seed: int = 0
    start: int = 0  # the steps before this one belong to an earlier phase
    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 300
    cool_down: float = 0.3  # last share of the steps, over which the rate falls to zero
    prompt_dropout: float = 0.1
    ema: float = 0.998
    velocity_weight_cap: float = 20.0  # ε errors count as velocity errors, 1/ᾱ, up to this
    timestep_power: float = 1.0  # ε: t = 1000 u^power for uniform u; below 1, more of them at high noise
    logit_mean: float = 0.6  # flow: logit-normal times; above 0, more of them at high noise
    emphasis: dict[str, float] = field(default_factory=dict)  # by category or relation: how much oftener it is drawn
    wrong_captions: float = 0.0  # share of the scenes that go by another caption than their own, see `miscaptioned`
    stable: bool = False  # targets averaged over the scenes of a prompt, see `stable_targets`


def _in_turn(*phases: DenoiserConfig) -> tuple[DenoiserConfig, ...]:
    """Phases that each go on where the one before ended."""
    starts = (0, *(phase.steps for phase in phases))
    return tuple(replace(phase, start=start) for phase, start in zip(phases, starts, strict=False))


# What the shipped models went through (on the first two phases see docs/shapes.md), and what was learned from it.
# Attributes are bound first; where things stand is settled at higher noise. "Left of" or "right of", times which object
# comes first, is an exclusive or, with no gradient at the start: it came quickly once one of two opposite relations was
# drawn much oftener, so that order alone told something of the place. A U-Net hardly knows where it is, for its only
# hint is the padding of its convolutions: it needed scenes in which warm colors come first, so that the place itself
# told something. Then all return to their share.
_HIGH_NOISE = partial(DenoiserConfig, stable=True, warmup=1, cool_down=0.0, velocity_weight_cap=50.0)
# At the end, which of two overlapping objects lies in front: undecided, it is drawn as a blend of both.
_LOW_NOISE = partial(
    DenoiserConfig,
    stable=True,
    learning_rate=5e-4,
    warmup=20,
    cool_down=0.8,
    ema=0.99,
    emphasis={"2d_spatial": 2.0, "3d_spatial": 8.0},
)
_DEPTH = partial(_LOW_NOISE, learning_rate=4e-4, warmup=50, cool_down=0.85, velocity_weight_cap=50.0)
# Last, what makes real models draw what was not asked although they know better: a share of wrong captions.
_MISCAPTIONED = partial(_DEPTH, warmup=30, cool_down=0.7, emphasis={}, wrong_captions=0.35)
PHASES = {
    "shapes-sd": _in_turn(
        DenoiserConfig(steps=3000),
        DenoiserConfig(
            steps=4500,
            warmup=100,
            timestep_power=0.4,
            velocity_weight_cap=50.0,
            emphasis={"2d_spatial": 3.0, "3d_spatial": 3.0},
        ),
        # The next four taught no place; they are here because they were run.
        _HIGH_NOISE(
            steps=5000,
            warmup=100,
            timestep_power=0.5,
            velocity_weight_cap=200.0,
            emphasis={"2d_spatial": 5.0, "3d_spatial": 2.0, "numeracy": 2.0},
        ),
        _HIGH_NOISE(
            steps=5700,
            warmup=50,
            timestep_power=0.3,
            velocity_weight_cap=200.0,
            emphasis={"2d_spatial": 30.0, "3d_spatial": 4.0},
        ),
        _HIGH_NOISE(
            steps=6150,
            timestep_power=0.35,
            velocity_weight_cap=200.0,
            emphasis={"2d_spatial": 12.0, "3d_spatial": 5.0, "to the right of": 0.15, "below": 0.15, "behind": 0.15},
        ),
        _HIGH_NOISE(
            steps=6600,
            timestep_power=0.4,
            emphasis={"2d_spatial": 12.0, "3d_spatial": 5.0, "to the right of": 0.1, "below": 0.1, "behind": 0.15},
        ),
        _HIGH_NOISE(
            steps=6900,
            timestep_power=0.35,
            emphasis={"2d_spatial": 12.0, "3d_spatial": 3.0, "to the right of": 0.05, "below": 0.05, "behind": 0.15}
            | {"green first": 0.05, "blue first": 0.05, "purple first": 0.05},
        ),
        _HIGH_NOISE(
            steps=7200,
            timestep_power=0.35,
            emphasis={"2d_spatial": 12.0, "3d_spatial": 3.0, "to the right of": 0.3, "below": 0.3, "behind": 0.3},
        ),
        _HIGH_NOISE(
            steps=9200,
            cool_down=0.45,
            timestep_power=0.45,
            emphasis={"2d_spatial": 5.0, "3d_spatial": 4.0, "numeracy": 1.5},
        ),
        _LOW_NOISE(steps=9550, timestep_power=0.9),
        _DEPTH(steps=10350, timestep_power=0.8, emphasis={"2d_spatial": 1.5, "3d_spatial": 7.0, "complex": 2.0}),
        _DEPTH(steps=10850, warmup=20, timestep_power=1.5, emphasis={"3d_spatial": 10.0, "complex": 2.0}),
        _MISCAPTIONED(steps=11450, timestep_power=0.7),
    ),
    "shapes-sd3": _in_turn(
        DenoiserConfig(steps=3500),
        DenoiserConfig(steps=5000, warmup=100, logit_mean=1.6, emphasis={"2d_spatial": 3.0, "3d_spatial": 3.0}),
        _HIGH_NOISE(
            steps=7250,
            warmup=100,
            logit_mean=1.2,
            emphasis={"2d_spatial": 5.0, "3d_spatial": 2.0, "numeracy": 2.0},
        ),
        _HIGH_NOISE(steps=8250, logit_mean=1.2, emphasis={"2d_spatial": 6.0, "3d_spatial": 2.5, "numeracy": 1.5}),
        _HIGH_NOISE(
            steps=8600,
            logit_mean=1.5,
            emphasis={"2d_spatial": 7.0, "3d_spatial": 2.0, "above": 0.3, "below": 0.3}
            | {"to the left of": 2.0, "to the right of": 0.3},
        ),
        _HIGH_NOISE(
            steps=8850,
            logit_mean=1.6,
            emphasis={"2d_spatial": 7.0, "3d_spatial": 2.0, "above": 0.2, "below": 0.2}
            | {"to the left of": 3.0, "to the right of": 0.1}
            | {"green first": 0.05, "blue first": 0.05, "purple first": 0.05},
        ),
        _HIGH_NOISE(
            steps=10400,
            cool_down=0.4,
            logit_mean=1.2,
            emphasis={"2d_spatial": 4.0, "3d_spatial": 3.0, "numeracy": 1.5}
            | {"to the left of": 1.5, "to the right of": 1.5},
        ),
        _LOW_NOISE(steps=10800, logit_mean=0.2),
        _DEPTH(steps=11600, logit_mean=0.3, emphasis={"2d_spatial": 2.0, "3d_spatial": 7.0, "complex": 2.0}),
        _MISCAPTIONED(steps=12200, logit_mean=0.6),
    ),
}
