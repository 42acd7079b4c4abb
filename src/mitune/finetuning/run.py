"""Fine-tunes an adapter on images that the model made itself.

A set's cached latents and conditioning are all that it takes; VAE and text encoders stay on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.network import components_of
from mitune.denoiser.opening.adapter_file import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_FILE, adapter_checksum
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.identity import model_identity, model_parts, settings_that_matter
from mitune.denoiser.opening.models import device_of, parts_of
from mitune.denoiser.pipeline import Pipeline
from mitune.errors import MituneError
from mitune.finetuning.adapter import check_rank, save_adapter, trainable
from mitune.finetuning.card import write_card
from mitune.finetuning.checkpoint import TrainingState
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import shift_of
from mitune.finetuning.history import rows_of
from mitune.finetuning.network import AdaptedNetwork, check_fit, fast_layers, open_network
from mitune.finetuning.objectives.base import OBJECTIVES, Objective, check_set
from mitune.finetuning.trainer import Progress, Trainer
from mitune.finetuning.watch import check_learned
from mitune.run.locks import sole_worker
from mitune.run.sealed import unpack
from mitune.run.store import claim, read_again

_NOTES = "mitune"  # of an adapter file: what its training took
_HISTORY, _CHECKPOINT = "training.jsonl", "checkpoint/state.safetensors"


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """Where the adapter lies, and what training it took."""

    adapter: Path
    iterations: int
    skipped: int  # of these, the ones without effect, because loss or gradient was not finite
    seconds: float


def finetune(
    model: ModelConfig,
    dataset: Path,
    output: Path,
    config: FinetuneConfig,
    *,
    start_from: Path | None = None,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Trains an adapter on the fine-tuning set in `dataset` and writes it to `output`, for `pipe.load_lora_weights`.

    start_from: the adapter of an earlier round, whose training goes on. progress: called after each iteration with
    the iterations done, those in all, and the loss. The same call goes on from the last checkpoint, or returns at once
    when all is done. `output` also gets a model card and training.jsonl, one row an iteration.
    Raises MituneError for a damaged set, or one that the objective has no use for, an `output` of other settings, or
    too little memory for a single image.
    """
    device, objective = _device(model, config), OBJECTIVES.resolve(config.objective)
    components, images = Components.of(model), TrainingSet.read(dataset)
    check_set(objective, config.objective, ranked=images.is_ranked, rivals=images.rivals is not None)
    if not Path(parts_of(model)).is_dir() and not (output / "settings.json").exists():
        components.denoiser()  # onto this machine, so that its contents are known
    parts = model_parts(model)
    images.check_model(model.name, {components.denoiser_name: parts[components.denoiser_name]})
    with sole_worker(output):
        claim(output, _identity(components, parts, images, config, start_from), "fine-tuning")
        notes = _finished(output)
        if notes is None:
            with _accelerator(config, device) as accelerator:
                network = open_network(components, config, device, start_from)
                state = _train(network, objective, images, config, accelerator, components, output, progress)
                notes = {"iterations": state.iterations, "skipped": state.skipped}
                save_adapter(output, components.pipeline_class, network.modules, {_NOTES: json.dumps(notes)})
        write_card(output, model, config, prompts=images.prompts, selection=images.selection, skipped=notes["skipped"])
    seconds = sum(row["seconds"] for row in rows_of(output / _HISTORY))
    return FinetuneResult(output, notes["iterations"], notes["skipped"], seconds)


def _train(
    network: AdaptedNetwork,
    objective: Objective,
    images: TrainingSet,
    config: FinetuneConfig,
    accelerator: Accelerator,
    components: Components,
    output: Path,
    progress: Progress | None,
) -> TrainingState:
    """Trains the adapters of `network` to the end, and leaves in them what is to be saved."""
    with accelerator.autocast():
        check_fit(network, images, components.config.name)
    first = {name: value.detach().cpu().clone() for name, value in trainable(network.modules).items()}
    trainer = Trainer(network, objective, images, config, accelerator, shift=shift_of(components.scheduler()))
    # In mixed precision, merged weights would be rounded, and small changes lost.
    with fast_layers(network, merged=config.precision == "no", compiled=components.config.compile):
        trainer.run(output / _CHECKPOINT, output / _HISTORY, progress)
    trainer.use_average()
    check_learned(trainer.state, first)
    return trainer.state


def check_trainable(model: ModelConfig, config: FinetuneConfig, pipe: Pipeline) -> None:
    """Raises MituneError if `finetune` would refuse this model, opened as `pipe`, or the settings."""
    _device(model, config)
    OBJECTIVES.resolve(config.objective)
    components = Components.of(model)
    text_encoders = components.text_encoder_names if config.text_encoder else []
    for name in (components.denoiser_name, *text_encoders):
        check_rank(components_of(pipe)[name], config.rank)


def is_trained(output: Path) -> bool:
    """Whether a whole adapter of a training that came to its end lies in this folder."""
    return _finished(output) is not None


def _device(model: ModelConfig, config: FinetuneConfig) -> torch.device:
    device = device_of(model)
    if config.precision == "fp16" and device.type == "cpu":
        raise MituneError("finetune.precision = fp16 needs a GPU; set it to bf16 or no.")
    return device


def _identity(
    components: Components,
    parts: Mapping[str, str],
    images: TrainingSet,
    config: FinetuneConfig,
    start_from: Path | None,
) -> dict[str, object]:
    """All that the adapter is a function of, but for rounding."""
    read = {components.denoiser_name, "scheduler"}
    model = model_identity(components.config)
    del model["adapter"]
    if config.text_encoder:
        read |= {name for name in parts if name.startswith(("text_encoder", "tokenizer"))}
    else:
        del model["call"]  # the arguments of the text encoders
    return {
        "model": model | {"parts": {name: parts[name] for name in sorted(read & parts.keys())}},
        "set": images.checksum,
        "start_from": adapter_checksum(start_from),
        "finetune": settings_that_matter(config),
    }


def _finished(output: Path) -> dict[str, Any] | None:
    """What the adapter's header says of its training; None if it is not done. Damaged files are set aside."""
    for name, parse in ((PEFT_CONFIG, json.loads), (PEFT_WEIGHTS, partial(unpack, ours=True))):
        if (output / name).exists() and read_again(output / name, parse) is None:
            return None
    return read_again(output / WEIGHTS_FILE, lambda content: json.loads(unpack(content, ours=True)[1][_NOTES]))


@contextmanager
def _accelerator(config: FinetuneConfig, device: torch.device) -> Iterator[Accelerator]:
    """accelerate keeps its settings once a process; they are handed back, so that the next call may have others."""
    was_initialized = is_initialized()
    try:
        yield Accelerator(mixed_precision=config.precision, cpu=device.type == "cpu")
    finally:
        if not was_initialized:
            AcceleratorState._reset_state(reset_partial_state=True)
