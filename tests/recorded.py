"""The figures of a small run of each embedded model, recorded in `recorded.json`, so that no change of the code's
structure changes a result without a word.

    python -m tests.recorded            prints SHA-256 sums, equal bit for bit on one machine
    python -m tests.recorded --write    records the figures anew, after a change that is meant to change them
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from mitune import Config, EvalConfig, FinetuneConfig, ModelConfig, PoolConfig, tune

MODELS = ("shapes-sd", "shapes-sd3")
FILE = Path(__file__).with_name("recorded.json")
PROMPTS = "a red circle\nthree green crosses\na blue square above a yellow triangle\n"


def small_run(model: str, folder: Path) -> Path:
    """Pool, two sets, two adapters and a verdict, in some twenty seconds; returns the run's folder."""
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPTS)
    config = Config(
        model=ModelConfig(name=model, device="cpu", steps=6),
        pool=PoolConfig(candidates=8, select=("contrast", "mi-tune"), batch_size=24),
        finetune=FinetuneConfig(rank=4, alpha=4.0, learning_rate=1e-3, batch_size=6, iterations=4, ema=0.9),
        eval=EvalConfig(images=1, batch_size=3),
        prompts=str(prompts),
        eval_prompts=str(prompts),
    )
    return tune(config, folder / "run").run


def figures(run: Path) -> dict[str, list[float]]:
    """Every number in the run's tables, and the norms of its tensors, by name; what is no number is 0."""
    values: dict[str, list[float]] = {}
    for name, file in (("pool", "round-1/pool/candidates.parquet"), ("verdict", "eval/images.parquet")):
        table = pq.read_table(run / file)
        for column in table.column_names:
            kind = table[column].type
            if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind):
                rows = np.array([0 if row is None else row for row in table[column].to_pylist()], float)
                values[f"{name} {column}"] = np.nan_to_num(rows, posinf=0, neginf=0).tolist()
    for file in sorted(run.rglob("*.safetensors")):
        if file.parent.name not in ("records", "checkpoint"):
            norms = [tensor.double().norm().item() for _, tensor in sorted(load_file(file).items())]
            values[f"norms {file.relative_to(run)}"] = norms
    return values


def sums(run: Path) -> dict[str, str]:
    """SHA-256 of the numbers in tables and tensors, by file."""
    digests = {}
    for file in sorted(run.rglob("*.safetensors")):
        tensors = [tensor.flatten().contiguous().view(torch.uint8) for _, tensor in sorted(load_file(file).items())]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        digests[str(file.relative_to(run))] = hashlib.sha256(content).hexdigest()
    table = {name: rows for name, rows in figures(run).items() if "seconds" not in name}
    return digests | {"tables": hashlib.sha256(json.dumps(table).encode()).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write, recorded = parser.parse_args().write, {}
    torch.set_num_threads(1)
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            run = small_run(model, Path(folder))
            recorded[model] = figures(run)
            print(model, json.dumps(sums(run), indent=1))
    if write:
        FILE.write_text(json.dumps(recorded) + "\n")


if __name__ == "__main__":
    main()
