"""The loop of a fine-tuning: denoiser, adapter and optimizer, from the last checkpoint to the end.

Batch, noise and timesteps of iteration i are a function of (seed, i) alone, so a run that was stopped ends like one
that was not. A signal may stop it at any moment: the state of the last whole iteration is then written at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.network import compile_denoiser, network_output
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import call_arguments
from mitune.denoiser.path import path_of
from mitune.errors import MituneError, first_line
from mitune.finetuning.adapter import REMEDY, add_adapter, check_rank, load_weights, trainable
from mitune.finetuning.checkpoint import TrainingState
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.layers import channels_last, merged_layers
from mitune.finetuning.loss import Draw, denoising_errors, draw, encode, shift_of
from mitune.run.stopping import signals_held
from mitune.run.store import DAMAGED, write_bytes, writing

log = logging.getLogger(__name__)
Progress = Callable[[int, int, float], None]  # iterations done, iterations in all, loss
LOST = 25  # iterations in a row with no finite, sensible loss: fine-tuning has diverged
_BEYOND = 10.0  # times the loss of a network that predicts nothing: no model that works has it


class Trainer:
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
            check_rank(module, config.rank)
            add_adapter(module, config)
        if start_from is not None:
            load_weights(start_from, self.modules)
        self.denoiser.to(device)
        self._check_fit(components)
        if self.text_pipe is not None:
            self.text_pipe.to(device)
            self._check_text()
        parameters = trainable(self.modules)
        self.first = {name: value.detach().cpu().clone() for name, value in parameters.items()}
        # Of ε, z₀, v = αε − σz₀ and v = ε − z₀, the last has the largest mean square.
        nothing = 1 + images.latents.square().mean().item()
        self.most = _BEYOND * images.weights.max().item() * nothing
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

    def _check_fit(self, components: Components) -> None:
        """One image through the network: a set of another model has latents or embeddings of other shapes."""
        images, told = (
            self.images,
            f"The set does not fit the {type(self.denoiser).__name__} of {components.config.name}",
        )
        latents = images.latents[:1].to(self.device)
        conditioning = {name: tensor[:1].to(self.device) for name, tensor in images.conditioning.items()}
        timesteps = torch.full((1,), 0.5 * self.path.training_steps, device=self.device)
        try:
            with torch.no_grad(), self.accelerator.autocast():
                predicted = network_output(self.denoiser, latents, conditioning, timesteps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # every family has errors of its own
            raise MituneError(f"{told} ({first_line(error)}); name the model that made it with --model.") from error
        if predicted.shape != latents.shape:
            shapes = f"{tuple(latents.shape[1:])} in, {tuple(predicted.shape[1:])} out"
            raise MituneError(f"{told} (latents {shapes}); name the model that made it with --model.")

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
        """Trains from the last checkpoint, if there is one, to the end.

        Raises MituneError if the loss is lost: it diverged, or was never there.
        """
        state, total = self.state, self.config.iterations
        state.load(checkpoint)
        self._check_loss(total)
        write_bytes(history, _rows_before(history, state.iterations))
        with writing(history), history.open("a", encoding="utf-8") as out:
            try:
                while state.iterations < total:
                    loss = self._iterate(out)
                    if state.iterations % self.config.checkpoint_every == 0 or state.iterations == total:
                        self._save(checkpoint, out)
                    self._check_loss(total)
                    if progress is not None:
                        progress(state.iterations, total, loss)
            except KeyboardInterrupt:  # by a signal: what was done in vain is the unfinished iteration alone
                self._save(checkpoint, out)
                raise

    def _save(self, checkpoint: Path, history: TextIO) -> None:
        with signals_held():
            history.flush()
            os.fsync(history.fileno())  # a checkpoint never knows of more iterations than the history
            self.state.save(checkpoint)

    def _check_loss(self, total: int) -> None:
        """Raises MituneError where the loss is lost, for good or for most of the iterations."""
        state = self.state
        done = state.iterations == total
        if state.lost_in_a_row < LOST and not (done and 2 * state.lost > total):
            return
        which = f"the last {state.lost_in_a_row}" if state.lost_in_a_row >= LOST else f"{state.lost} of {total}"
        raise MituneError(
            f"Fine-tuning diverged, and no adapter is written: in {which} iterations the loss was not finite, or "
            f"{_BEYOND:g} times what predicting nothing would give. {REMEDY}"
        )

    def check_weights(self) -> None:
        """Raises MituneError if nothing was learned: the adapter changes no more than it did at first."""
        values = {name: value for name, value in self.state.parameters.items() if "lora_B" in name}
        if all(torch.equal(value.detach().cpu(), self.first[name]) for name, value in values.items()):
            raise MituneError(
                f"Fine-tuning learned nothing, and no adapter is written: after {self.config.iterations} iterations "
                "its weights are what they were; raise finetune.learning_rate, or set model.dtype to float32."
            )

    def _iterate(self, history: TextIO) -> float:
        """One step of the optimizer, and its row in the history; returns the loss, which may not be finite."""
        state, config, began = self.state, self.config, time.monotonic()
        iteration = state.iterations
        loss = self._accumulate(draw(self.images, self.path, self.shift, config, iteration))
        norm = self.accelerator.clip_grad_norm_(list(state.parameters.values()), config.clip)
        # The only wait for the device in an iteration: whether to take the step cannot be put off.
        values = torch.stack([loss, norm]).tolist()
        finite = all(math.isfinite(value) for value in values)
        with signals_held():  # up to here nothing has changed but gradients
            if finite or state.scaler is not None:  # the scaler leaves such a step out itself, and lowers its scale
                rate = config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup))
                self.optimizer.param_groups[0]["lr"] = rate
                self.optimizer.step()
            self.optimizer.zero_grad()
            if not finite:
                log.warning("Iteration %d is skipped: its loss is %g, its gradient norm %g.", iteration, *values)
            elif state.average is not None and config.ema is not None:
                decay = min(config.ema, (1 + iteration) / (10 + iteration))  # short at first, or the start would linger
                for name, parameter in state.parameters.items():
                    state.average[name].lerp_(parameter.detach(), 1 - decay)
            lost = not finite or values[0] > self.most
            state.iterations += 1
            state.skipped += not finite
            state.lost += lost
            state.lost_in_a_row = state.lost_in_a_row + 1 if lost else 0
            row = {
                "iteration": iteration,
                "loss": values[0] if math.isfinite(values[0]) else None,
                "gradient_norm": values[1] if math.isfinite(values[1]) else None,
                "skipped": not finite,
                "seconds": round(time.monotonic() - began, 4),
            }
            history.write(json.dumps(row) + "\n")
        return float(values[0])

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


def rows_of(history: Path) -> list[dict[str, Any]]:
    """The rows of a training.jsonl, by iteration; half-written ones are left out."""
    content = history.read_bytes() if history.is_file() else b""
    rows = {}
    for line in content.split(b"\n"):
        with suppress(*DAMAGED):
            row = json.loads(line)
            rows[int(row["iteration"])] = {**row, "seconds": float(row["seconds"])}
    return [rows[iteration] for iteration in sorted(rows)]


def _rows_before(history: Path, iterations: int) -> bytes:
    """The rows of the iterations that are done, as they go on in the file; later ones are made again."""
    rows = [row for row in rows_of(history) if row["iteration"] < iterations]
    if len(rows) < iterations:
        missing = iterations - len(rows)
        log.warning("%s lacks %d of %d rows; the adapter does not depend on them.", history, missing, iterations)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
