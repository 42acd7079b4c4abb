"""What the benchmarks share: the clock, alternating pairs, and lines of a table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.models import device_of

DEVICE = device_of(ModelConfig())
CLOCK = "wall time" if DEVICE.type == "cuda" else "processor time on one thread"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of what was measured."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lowest:.3g} to {self.highest:.3g})"


def now() -> float:
    """Seconds, once the GPU has done its work. On a CPU the processor's own, so that a busy neighbor does not count."""
    if DEVICE.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    """What one call takes."""
    began = now()
    run()
    return now() - began


def cost_ratio(one: Callable[[], object], other: Callable[[], object], pairs: int) -> Spread:
    """The cost of one ÷ that of the other, over alternating pairs."""
    one(), other()  # the first call of each builds caches
    return Spread.of([seconds(one) / seconds(other) for _ in range(pairs)])


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table with the machine under it."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(map(str, row)), "|")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    print(f"\n{machine()}; {versions}; {CLOCK}.", flush=True)


def machine() -> str:
    """The GPU, or else the processor."""
    if DEVICE.type == "cuda":
        return str(torch.cuda.get_device_name())
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
