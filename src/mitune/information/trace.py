"""The terms of sampling trajectories, step by step: what on-line scores are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mitune.errors import MituneError


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """Terms of (1) at each of the T denoiser steps of B trajectories: float32 on the CPU, steps from noise to clean.

    Every preset in `SCORES` can be computed from them again, without the model. Terms that do not exist are NaN.
    """

    log_snr: Tensor  # (T,) λ; −inf at pure noise
    timestep: Tensor  # (T,) the scheduler's
    beta: Tensor  # (T,) β_t of the training schedule; NaN for flow
    difference: Tensor  # (B, T) ‖Δε‖²
    difference_velocity: Tensor  # (B, T) ‖Δv‖² = ‖Δε‖²/α²; a v-network has it at pure noise, too
    dot_conditional: Tensor  # (B, T) u·(u − u_∅), u the flow velocity with the prompt
    dot_guided: Tensor  # (B, T) the same with the guided velocity for u
    error_conditional: Tensor  # (B, T) ‖ε̂(z | p) − ε‖², ε the trajectory's own noise
    error_null: Tensor  # (B, T) ‖ε̂(z | ∅) − ε‖²
    dimensions: int  # of z₀
    is_flow: bool
    training_steps: int = 1000  # T of the training schedule
    planned_steps: int | None = None  # of the whole run, where the trace is of its beginning

    def __len__(self) -> int:
        return self.difference.shape[0]

    def select(self, candidates: Sequence[int]) -> Trace:
        """The same trace with these candidates alone, in this order."""
        index = torch.tensor(candidates, dtype=torch.long)
        return Trace(**{name: value[index] if name in PER_CANDIDATE else value for name, value in self._items()})

    def spread(self, places: Sequence[int], count: int) -> Trace:
        """The inverse of `select`: among `count` candidates, these at `places`; the terms of the others are NaN."""
        rows = torch.full((count, self.difference.shape[1]), math.nan)
        index = torch.tensor(places, dtype=torch.long)
        spread: dict[str, Any] = dict(self._items())
        spread |= {name: rows.index_copy(0, index, spread[name]) for name in PER_CANDIDATE}
        return Trace(**spread)

    def to_columns(self) -> dict[str, list[Any]]:
        """One entry per candidate in every column: lists of T numbers, and plain numbers. Parquet takes them as is."""
        columns: dict[str, list[Any]] = {}
        for name, value in self._items():
            row = value.tolist() if isinstance(value, Tensor) else value
            columns[name] = row if name in PER_CANDIDATE else [row] * len(self)
        return columns

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]]) -> Trace:
        """The inverse of `to_columns`. Raises MituneError where rows differ in schedule, or columns lack."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in columns]:
            raise MituneError(
                f"A table of trajectories lacks {', '.join(missing)}, as those of other versions of mitune may; make "
                "it again with this one."
            )
        arguments: dict[str, Any] = {}
        for name in names:
            rows = list(columns[name])
            if name not in PER_CANDIDATE:
                if any(not _same(row, rows[0]) for row in rows):
                    raise MituneError(
                        f"Column {name} differs between these trajectories, so they are of different schedules or "
                        "lengths; make one Trace for each group of equal ones."
                    )
                rows = rows[0]
            arguments[name] = torch.tensor(rows, dtype=torch.float32) if name in _TENSORS else rows
        return cls(**arguments)

    def _items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


PER_CANDIDATE = (
    "difference",
    "difference_velocity",
    "dot_conditional",
    "dot_guided",
    "error_conditional",
    "error_null",
)
_TENSORS = ("log_snr", "timestep", "beta", *PER_CANDIDATE)


def _same(row: Any, other: Any) -> bool:
    if isinstance(row, (int, float, type(None))):
        return bool(row == other)
    a, b = torch.tensor(row), torch.tensor(other)
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
