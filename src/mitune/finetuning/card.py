"""The model card that lies beside an adapter: what it was made from and how, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

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
    embedded, name = embedded_model(model.name) is not None, public_name(model.name)
    base = f"model_folder({name!r})" if embedded else repr(name)
    imports = "from mitune.denoiser.opening.models import model_folder\n" if embedded else ""
    load = f'pipe.load_lora_weights(".", weight_name={WEIGHTS_FILE!r})'
    if (folder / PEFT_CONFIG).exists():
        imports += "from peft import PeftModel\n"
        load = 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")'
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    card = f"""---
base_model: {json.dumps(name)}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{config.adapter}, lora, mitune]
---

# A {"DoRA" if config.adapter == "dora" else "LoRA"} adapter for {name}

Fine-tuned with mitune on {len(prompts)} of the model's own images, for {len(set(prompts))} prompts.
Images were chosen by: {selection}. Iterations skipped, as the loss was not finite: {skipped} of {config.iterations}.

```python
from diffusers import DiffusionPipeline
{imports}
pipe = DiffusionPipeline.from_pretrained({base})
{load}  # "." is the folder of this card
```

| setting | value |
|---|---|
{settings}
"""
    write_bytes(folder / CARD_FILE, card.encode())


def public_name(model: str) -> str:
    """A model's hub id or embedded name; of a folder or file on this machine, its last part alone."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.exists() else model
