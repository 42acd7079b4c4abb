"""What a pipeline makes of the outputs with and without the prompt, seen where it hands it to its scheduler.

    made = k · (ε̂_∅ + w · (ε̂_p − ε̂_∅))        w: the guidance scale, k: rescales an image, or each of its rows

So the scheduler's own step tells whether the two outputs are what we take them for: with the halves the other way
round the weight w comes out as 1 − w, with another sign k is negative, and whatever else was made leaves a residual.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mitune.denoiser.pipeline import Scheduler

ROWS = 4  # candidates of a batch that are looked at
_MISFIT = 0.05  # of what guidance adds: what may be left of the output once the sum is taken away
_CERTAIN = 0.02  # of the guidance scale: its error from rounding


@dataclass(frozen=True, slots=True)
class Handed:
    """What the step of a scheduler was called with."""

    output: Tensor
    timestep: float | Tensor
    sample: Tensor


@dataclass(frozen=True, slots=True)
class Sum:
    """How an output was put together: k, w, and what is left, as shares of its norm."""

    weight: float  # w
    total: float  # k
    left: float  # ‖made − k(…)‖
    added: float  # ‖k w (ε̂_p − ε̂_∅)‖
    across: float  # of ε̂_p − ε̂_∅, the part that is not along ε̂_∅
    entries: int
    precision: float  # of the numbers that it was made of

    @property
    def certain(self) -> bool:
        """Whether the two outputs differ by enough to tell; they don't where the prompt is the empty one."""
        if not all(map(math.isfinite, (self.weight, self.total, self.left, self.across))):
            return False
        error = self.precision / (math.sqrt(self.entries) * max(self.across, 1e-30))
        return error < _CERTAIN and self.across > 1e-5

    @property
    def fits(self) -> bool:
        """Whether the output is a guided sum, of whatever order and sign."""
        return self.left <= _MISFIT * self.added + 3 * self.precision

    @property
    def in_order(self) -> bool:
        """Whether the output with the prompt has the larger weight, and a positive one."""
        return self.total > 0 and self.weight > 0.5


@contextmanager
def steps_watched(scheduler: Scheduler, watch: Callable[[Handed | None], None]) -> Iterator[None]:
    """Calls `watch` before each step of the scheduler; with None where its arguments have other names."""
    before = scheduler.__dict__.get("step")
    step = before or type(scheduler).step
    signature = inspect.signature(scheduler.step)

    @functools.wraps(step)  # pipelines ask whether it takes a generator
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        names = ("model_output", "timestep", "sample")
        known = all(name in arguments for name in names)
        watch(Handed(*(arguments[name] for name in names)) if known else None)
        return before(*args, **kwargs) if before else type(self).step(self, *args, **kwargs)

    # A method, so that it is that of the copy where a pipeline makes one.
    scheduler.step = MethodType(watched, scheduler)
    try:
        yield
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before


def sums(null: Tensor, conditional: Tensor, output: Tensor) -> list[Sum]:
    """The same output as a sum with one k for each image, and as one with a k for each of its rows; (B, ...) each.

    Waits for the device.
    """
    precision = max(torch.finfo(tensor.dtype).eps for tensor in (null, conditional, output))
    tensors = [tensor.float() for tensor in (null, conditional, output)]
    fits = torch.stack([_fitted(*(x.flatten(1) for x in tensors)), _fitted(*(x.flatten(0, -2) for x in tensors))])
    return [Sum(w, k, left, added, across, output.numel(), precision) for w, k, left, added, across in fits.tolist()]


def _fitted(null: Tensor, conditional: Tensor, output: Tensor) -> Tensor:
    """w, k, left, added and across of `Sum`, (5,), by least squares for each of N rows, (N, D) each."""
    tiny = torch.finfo(torch.float32).tiny
    change = conditional - null
    length = null.square().sum(dim=1).clamp(min=tiny)
    along = (null * change).sum(dim=1) / length
    across = change - along.unsqueeze(1) * null
    weights = across.square().sum(dim=1)
    on_change = (output * across).sum(dim=1) / weights.clamp(min=tiny)
    total = (output * null).sum(dim=1) / length - on_change * along
    added = on_change.unsqueeze(1) * change
    left = output - total.unsqueeze(1) * null - added
    q, k = (weights * on_change).sum() / weights.sum(), (weights * total).sum() / weights.sum()
    norm = output.norm()
    return torch.stack([q / k, k, left.norm() / norm, added.norm() / norm, across.norm() / norm])
