"""Where does a pool's time go?  The share of each part of `build_pool`, on the embedded models.

    python benchmarks/pool_parts.py

The parts are watched from outside, at the functions where they begin; none lies within another.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from timing import now, print_table

from mitune.config.schema import ModelConfig, PoolConfig
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.probe import MIProbe, denoiser_of
from mitune.pool.build import build_pool
from mitune.run.records import Records
from mitune.worlds.shapes.prompts import prompt_list
from mitune.worlds.shapes.world import MODELS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=32)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = PoolConfig(candidates=arguments.candidates, batch_size=arguments.candidates)
    prompts = [listed.text for listed in prompt_list("color")[: arguments.prompts]]
    shares: dict[str, list[str]] = {}
    for name in MODELS:
        model = load_model(ModelConfig(name=name))
        for _ in range(2):  # the first time builds caches
            spent = parts_of_a_pool(model, prompts, config)
        whole = spent.pop("whole")
        for part, seconds in (spent | {"the rest": whole - sum(spent.values())}).items():
            shares.setdefault(part, []).append(f"{seconds / whole:.1%}")
    print_table(["part", *MODELS], [[part, *values] for part, values in shares.items()])


def parts_of_a_pool(model: Model, prompts: Sequence[str], config: PoolConfig) -> dict[str, float]:
    """Seconds of each part, and of the whole."""
    pipe: Any = model.pipe
    places = {
        "denoiser": (denoiser_of(pipe), "forward"),
        "text encoder": (pipe, "encode_prompt"),
        "sampler": (pipe.scheduler, "step"),
        "terms of the scores": (MIProbe, "trace"),
        "VAE, of what is kept or shown": (pipe.vae, "decode"),
        "PNG": (Image, "save"),
        "records": (Records, "write"),
    }
    spent = dict.fromkeys(places, 0.0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for part, (owner, name) in places.items():
            stack.enter_context(watched(owner, name, part, spent))
        began = now()
        build_pool(model, prompts, Path(folder) / "pool", config)
        return spent | {"whole": now() - began}


@contextmanager
def watched(owner: Any, name: str, part: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds within a method."""
    inherited, found = name not in vars(owner), getattr(owner, name)

    @wraps(found)  # pipelines and the probe read signatures
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = now()
        try:
            return found(*args, **kwargs)
        finally:
            spent[part] += now() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, found)


if __name__ == "__main__":
    main()
