"""The model card that lies beside an adapter: what it was made from and how, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.opening.adapter_file import PEFT_CONFIG, WEIGHTS_FILE
from mitune.run.store import write_bytes
from mitune.worlds.base import embedded_model

CARD_FILE = "README.md"


def write_card(
    folder: Path, model: ModelConfig, config: FinetuneConfig, *, prompts: Sequence[str], selection: str, skipped: int
) -> None:
    """Writes the card into the adapter's folder.

    prompts: one for each image of the set; selection: how its images were chosen. The card may be published, so it
    names no folder of this machine.
    """
    text = f"""Fine-tuned with mitune on {len(prompts)} of the model's own images, for {len(set(prompts))} prompts.
Images were chosen by: {selection}. Iterations skipped, as the loss was not finite: {skipped} of {config.iterations}."""
    table = _table("| setting | value |\n|---|---|", asdict(config).items())
    embedded = embedded_model(model.name) is not None
    _write(folder, public_name(model.name), config.adapter, text, table, embedded=embedded)


def write_merged_card(
    folder: Path, model: str, kind: Literal["lora", "dora"], summands: Sequence[tuple[Path, float, str]], rank: str
) -> None:
    """Writes the card of a weighted sum of adapters into its folder.

    model: its public name; summands: place, weight and SHA-256 of each adapter, of absolute places the last part
    alone; rank: a sentence on it.
    """
    text = f"Merged with mitune: a weighted sum of what other adapters change of the model's weights.\n{rank}"
    rows = [(_short(place), f"{weight:g}", checksum) for place, weight, checksum in summands]
    table = _table("| adapter | weight | SHA-256 |\n|---|--:|---|", rows)
    _write(folder, model, kind, text, table, embedded=embedded_model(model) is not None)


def _short(place: Path) -> str:
    return place.name if place.is_absolute() else place.as_posix()


def _table(head: str, rows: Iterable[Sequence[object]]) -> str:
    return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _write(folder: Path, name: str, kind: str, text: str, table: str, *, embedded: bool) -> None:
    base = f"model_folder({name!r})" if embedded else repr(name)
    imports = "from mitune.denoiser.opening.models import model_folder\n" if embedded else ""
    load = f'pipe.load_lora_weights(".", weight_name={WEIGHTS_FILE!r})'
    if (folder / PEFT_CONFIG).exists():
        imports += "from peft import PeftModel\n"
        load = 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")'
    card = f"""---
base_model: {json.dumps(name)}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{kind}, lora, mitune]
---

# A {"DoRA" if kind == "dora" else "LoRA"} adapter for {name}

{text}

```python
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained({base})
{load}  # "." is the folder of this card
```

{table}
"""
    write_bytes(folder / CARD_FILE, card.encode())


def public_name(model: str) -> str:
    """A model's hub id or embedded name; of a folder or file on this machine, its last part alone."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.exists() else model
