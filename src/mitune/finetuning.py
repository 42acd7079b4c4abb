"""Fine-tunes an adapter on images that the model made itself.

A set's cached latents and conditioning are all that it takes; VAE and text encoders stay on the disk. Batch, noise and
timesteps of iteration i are a function of (seed, i) alone, so a run that was stopped ends like one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from mitune.adapter import CARD_FILE, WEIGHTS_FILE, add_adapter, load_weights, save_adapter, trainable, write_card
from mitune.checkpoint import TrainingState
from mitune.components import Components
from mitune.config import FinetuneConfig, ModelConfig
from mitune.denoiser import compile_denoiser
from mitune.errors import MituneError
from mitune.loss import Draw, denoising_errors, draw, encode, shift_of
from mitune.merging import channels_last, merged_layers
from mitune.models import adapter_checksum, call_arguments, device_of
from mitune.path import path_of
from mitune.store import claim, write_bytes, writing
from mitune.training_set import TrainingSet

log = logging.getLogger(__name__)
Progress = Callable[[int, int, float], None]  # iterations done, iterations in all, loss


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
    Raises MituneError for a damaged set, an `output` of other settings, or too little memory for a single image.
    """
    device = device_of(model)
    if config.precision == "fp16" and device.type == "cpu":
        raise MituneError("finetune.precision = fp16 needs a GPU; set it to bf16 or no.")
    components, images = Components.of(model), TrainingSet.read(dataset)
    claim(output, _identity(model, images, config, start_from), "fine-tuning")
    history = output / "training.jsonl"
    if not ((output / CARD_FILE).exists() and (output / WEIGHTS_FILE).exists()):  # the card is written last
        with _accelerator(config, device) as accelerator:
            trainer = _Trainer(components, images, config, accelerator, device, start_from)
            with trainer.fast_layers():
                trainer.run(output / "checkpoint" / "state.safetensors", history, progress)
            trainer.use_average()
            save_adapter(output, components.pipeline_class, trainer.modules)
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    skipped = sum(row["skipped"] for row in rows)
    write_card(output, model, config, prompts=images.prompts, selection=images.selection, skipped=skipped)
    return FinetuneResult(output, len(rows), skipped, sum(row["seconds"] for row in rows))


def _identity(
    model: ModelConfig, images: TrainingSet, config: FinetuneConfig, start_from: Path | None
) -> dict[str, object]:
    """All that the adapter is a function of; the micro-batch changes its rounding at most."""
    settings = asdict(config)
    del settings["micro_batch_size"], settings["checkpoint_every"]
    source = {"model": model.name, "base": model.base, "revision": model.revision, "variant": model.variant}
    return {
        **source,
        "dtype": model.dtype,
        "set": images.checksum,
        "start_from": adapter_checksum(start_from),
        **settings,
    }


@contextmanager
def _accelerator(config: FinetuneConfig, device: torch.device) -> Iterator[Accelerator]:
    """accelerate keeps its settings once a process; they are handed back, so that the next call may have others."""
    found = is_initialized()
    try:
        yield Accelerator(mixed_precision=config.precision, cpu=device.type == "cpu")
    finally:
        if not found:
            AcceleratorState._reset_state(reset_partial_state=True)


class _Trainer:
    """Denoiser, adapter and optimizer of one fine-tuning."""

    def __init__(
        self,
        components: Components,
        images: TrainingSet,
        config: FinetuneConfig,
        accelerator: Accelerator,
        device: torch.device,
        start_from: Path | None,
    ) -> None:
        self.images, self.config, self.accelerator, self.device = images, config, accelerator, device
        scheduler = components.scheduler()
        self.path, self.shift = path_of(scheduler), shift_of(scheduler)
        self.call, self.compiled = call_arguments(components.config), components.config.compile
        # All stay in evaluation mode, as they are opened: dropout would make an iteration depend on more than its seed.
        self.denoiser = components.denoiser()
        self.modules: dict[str, nn.Module] = {components.denoiser_name: self.denoiser}
        self.text_pipe: Any = None
        if config.text_encoder:
            self.text_pipe = components.text_pipeline()
            self.modules |= {name: getattr(self.text_pipe, name) for name in components.text_encoder_names}
        for module in self.modules.values():
            add_adapter(module, config)
        if start_from is not None:
            load_weights(start_from, self.modules)
        self.denoiser.to(device)
        if self.text_pipe is not None:
            self.text_pipe.to(device)
            self._check_text()
        parameters = trainable(self.modules)
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.state = TrainingState(
            parameters=parameters,
            optimizer=optimizer,
            micro_batch_size=config.micro_batch_size or config.batch_size,
            average={name: value.detach().clone() for name, value in parameters.items()} if config.ema else None,
            scaler=accelerator.scaler,
        )

    def _check_text(self) -> None:
        """The prompts must still give what the denoiser saw when the images were made, in shape at least."""
        cached = self.images.conditioning
        with torch.no_grad():
            fresh = encode(self.text_pipe, self.images.prompts[:1], self.call, cached)
        for name, tensor in fresh.items():
            if tensor.shape[1:] != cached[name].shape[1:]:
                raise MituneError(
                    f"The prompts give {name} of shape {tuple(tensor.shape[1:])}, but the set holds "
                    f"{tuple(cached[name].shape[1:])}; set model.call as it was when the set was made."
                )

    @contextmanager
    def fast_layers(self) -> Iterator[None]:
        """For the time of training; the modules come out as PEFT and diffusers know them."""
        modules = list(self.modules.values())
        with ExitStack() as stack:
            stack.enter_context(channels_last(modules))
            if self.config.precision == "no":  # else merged weights would be rounded, and small changes lost
                stack.enter_context(merged_layers(modules))
            if self.compiled:  # last, as it is to find the layers as they are now
                compile_denoiser(self.denoiser, self.device)
                stack.callback(delattr, self.denoiser, "forward")
            yield

    def run(self, checkpoint: Path, history: Path, progress: Progress | None) -> None:
        """Trains from the last checkpoint, if there is one, to the end."""
        state, total = self.state, self.config.iterations
        if checkpoint.exists():
            state.load(checkpoint)
        # Rows of iterations after the checkpoint go, as these are made again.
        lines = history.read_bytes().splitlines(keepends=True) if history.exists() else []
        write_bytes(history, b"".join(lines[: state.iterations]))
        with writing(history), history.open("a", encoding="utf-8") as out:
            while state.iterations < total:
                began = time.monotonic()
                loss, norm = self._iterate(state.iterations)
                finite = math.isfinite(loss) and math.isfinite(norm)
                row = {
                    "iteration": state.iterations,
                    "loss": loss if math.isfinite(loss) else None,
                    "gradient_norm": norm if math.isfinite(norm) else None,
                    "skipped": not finite,
                    "seconds": round(time.monotonic() - began, 4),
                }
                out.write(json.dumps(row) + "\n")
                state.iterations += 1
                if state.iterations % self.config.checkpoint_every == 0 or state.iterations == total:
                    out.flush()
                    os.fsync(out.fileno())  # a checkpoint never knows of more iterations than the history
                    state.save(checkpoint)
                if progress is not None:
                    progress(state.iterations, total, loss)

    def _iterate(self, iteration: int) -> tuple[float, float]:
        """One step of the optimizer; loss and gradient norm (before clipping), either of which may not be finite."""
        config = self.config
        loss = self._accumulate(draw(self.images, self.path, self.shift, config, iteration))
        norm = self.accelerator.clip_grad_norm_(list(self.state.parameters.values()), config.clip)
        # The only wait for the device in an iteration: whether to take the step cannot be put off.
        values = torch.stack([loss, norm]).tolist()
        finite = all(math.isfinite(value) for value in values)
        if finite or self.state.scaler is not None:  # the scaler leaves such a step out itself, and lowers its scale
            rate = config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup))
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not finite:
            log.warning("Iteration %d is skipped: its loss is %g, its gradient norm %g.", iteration, *values)
        elif self.state.average is not None and config.ema is not None:
            decay = min(config.ema, (1 + iteration) / (10 + iteration))  # short at first, or the start would linger
            for name, parameter in self.state.parameters.items():
                self.state.average[name].lerp_(parameter.detach(), 1 - decay)
        return values[0], values[1]

    def _accumulate(self, batch: Draw) -> Tensor:
        """Gradients of the whole batch, in micro-batches that are halved until they fit the memory; the loss, ()."""
        while True:
            try:
                return self._backward(batch)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.state.micro_batch_size == 1:
                    raise MituneError(
                        "Out of memory with one image at a time; set model.dtype = bfloat16, or take a larger GPU."
                    ) from error
            # Past the except clause, so that the error no longer holds the tensors of the failed pass.
            self.optimizer.zero_grad()
            self.state.micro_batch_size = (self.state.micro_batch_size + 1) // 2
            log.warning("Out of memory; going on with micro-batches of %d.", self.state.micro_batch_size)

    def _backward(self, batch: Draw) -> Tensor:
        images, total = self.images, torch.zeros((), device=self.device)
        for part in torch.split(torch.arange(len(batch.rows)), self.state.micro_batch_size):
            rows = batch.rows[part]
            tensors = (images.latents[rows], batch.noise[part], batch.timesteps[part], images.weights[rows])
            latents, noise, timesteps, weights = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
            conditioning = {k: v[rows].to(self.device, non_blocking=True) for k, v in images.conditioning.items()}
            with self.accelerator.autocast():
                if self.text_pipe is not None:
                    prompts = [images.prompts[row] for row in rows.tolist()]
                    conditioning |= encode(self.text_pipe, prompts, self.call, conditioning)
                errors = denoising_errors(self.denoiser, latents, conditioning, noise, timesteps, self.path)
            # Over the whole batch, not the part: so the gradients of any split add up to the same.
            loss = (weights * errors).sum() / len(batch.rows)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def use_average(self) -> None:
        """Puts the moving average in the place of the weights, if there is one."""
        for name, value in (self.state.average or {}).items():
            self.state.parameters[name].data.copy_(value)
