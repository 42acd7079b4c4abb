"""Does memory grow with the candidates or with the prompts?  The peak of a process for each size of the pool.

    python benchmarks/memory.py

The peak is that of the resident memory, or on a GPU of the memory allocated there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import DEVICE, print_table

from mitune.config.schema import ModelConfig, PoolConfig
from mitune.denoiser.opening.models import load_model
from mitune.pool.build import build_pool
from mitune.worlds.shapes.grammar import CATEGORIES
from mitune.worlds.shapes.prompts import prompt_list

BATCH, STEPS = 16, 2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--one", type=int, nargs=2, metavar=("PROMPTS", "CANDIDATES"), help="Print the peak of this.")
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(peak_of(*arguments.one))
        return
    prompts, candidates = arguments.prompts, arguments.candidates
    sizes = list(dict.fromkeys([*((p, candidates[0]) for p in prompts), *((prompts[0], m) for m in candidates)]))
    peaks = {size: measured_apart(*size) for size in sizes}
    least = peaks[sizes[0]]
    rows = [[p, m, f"{peak / 2**20:.0f}", f"{(peak - least) / 2**20:+.1f}"] for (p, m), peak in peaks.items()]
    print_table(["prompts", "candidates a prompt", "peak, MiB", "more than the first, MiB"], rows)


def measured_apart(prompts: int, candidates: int) -> int:
    """Bytes; in a process of its own, as a peak never falls."""
    command = [sys.executable, __file__, "--one", str(prompts), str(candidates)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of(prompts: int, candidates: int) -> int:
    torch.set_num_threads(1)
    model = load_model(ModelConfig(name="shapes-sd", steps=STEPS))
    listed = [prompt.text for category in CATEGORIES for prompt in prompt_list(category)]
    with tempfile.TemporaryDirectory() as folder:
        config = PoolConfig(candidates=candidates, batch_size=BATCH)
        build_pool(model, listed[:prompts], Path(folder) / "pool", config)
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
