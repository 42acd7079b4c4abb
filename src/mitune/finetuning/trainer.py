"""The iterations of a fine-tuning: draw a batch, add up its gradient, take a step.

Batch, timesteps and noise of an iteration are a function of (seed, iteration) alone, so training that goes on from a
checkpoint ends as if it had never stopped. A signal may stop it at any moment: the state of the last whole iteration is
then written at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from mitune.config.schema import FinetuneConfig
from mitune.errors import MituneError
from mitune.finetuning.adapter import trainable
from mitune.finetuning.checkpoint import TrainingState
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import Draw, draw
from mitune.finetuning.history import History
from mitune.finetuning.network import AdaptedNetwork
from mitune.finetuning.objectives.base import Objective, losses_of
from mitune.finetuning.watch import LossWatch
from mitune.run.stopping import signals_held

log = logging.getLogger(__name__)
Progress = Callable[[int, int, float], None]  # iterations done, iterations in all, loss


class Trainer:
    """The loop over the iterations of one fine-tuning, and its state."""

    def __init__(
        self,
        network: AdaptedNetwork,
        objective: Objective,
        images: TrainingSet,
        config: FinetuneConfig,
        accelerator: Accelerator,
        *,
        shift: float,
    ) -> None:
        self.network, self.objective, self.images, self.config = network, objective, images, config
        self.accelerator, self.shift = accelerator, shift
        self.path, self.device = network.denoiser.path, network.denoiser.device
        self.watch = LossWatch.of(images)
        parameters = trainable(network.modules)
        optimizer = _optimizer(parameters, config)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.state = TrainingState(
            parameters=parameters,
            optimizer=optimizer,
            micro_batch_size=config.micro_batch_size or config.batch_size,
            average={name: value.detach().clone() for name, value in parameters.items()} if config.ema else None,
            scaler=accelerator.scaler,
        )

    def run(self, checkpoint: Path, history: Path, progress: Progress | None) -> None:
        """Trains from the last checkpoint, if there is one, to the end.

        Raises MituneError if the loss is lost: it diverged, or was never there.
        """
        state, total = self.state, self.config.iterations
        state.load(checkpoint)
        self.watch.check(state, total)
        with History.opened(history, state.iterations) as rows:
            try:
                while state.iterations < total:
                    loss = self._iterate(rows)
                    if state.iterations % self.config.checkpoint_every == 0 or state.iterations == total:
                        self._save(checkpoint, rows)
                    self.watch.check(state, total)
                    if progress is not None:
                        progress(state.iterations, total, loss)
            except KeyboardInterrupt:  # by a signal: what was done in vain is the unfinished iteration alone
                self._save(checkpoint, rows)
                raise

    def _save(self, checkpoint: Path, history: History) -> None:
        with signals_held():
            history.sync()
            self.state.save(checkpoint)

    def _iterate(self, history: History) -> float:
        """One step of the optimizer, and its row in the history; returns the loss, which may not be finite."""
        state, config, began = self.state, self.config, time.monotonic()
        iteration = state.iterations
        total = self._accumulate(draw(self.images, self.path, self.shift, config, iteration))
        clipped = self.accelerator.clip_grad_norm_(list(state.parameters.values()), config.clip)
        # The only wait for the device in an iteration: whether to take the step cannot be put off.
        loss, norm = torch.stack([total, clipped]).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        with signals_held():  # up to here nothing has changed but gradients
            self._step(iteration, finite=finite)
            if not finite:
                log.warning("Iteration %d is skipped: its loss is %g, its gradient norm %g.", iteration, loss, norm)
            self.watch.count(state, loss, norm)
            history.add(iteration, loss, norm, skipped=not finite, seconds=time.monotonic() - began)
        return float(loss)

    def _step(self, iteration: int, *, finite: bool) -> None:
        """Moves the weights and their average, unless loss or gradient is not finite; clears the gradients."""
        state, config = self.state, self.config
        if finite or state.scaler is not None:  # the scaler leaves such a step out itself, and lowers its scale
            rate = config.learning_rate * min(1.0, (iteration + 1) / max(1, config.warmup))
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite and state.average is not None and config.ema is not None:
            decay = min(config.ema, (1 + iteration) / (10 + iteration))  # short at first, or the start would linger
            for name, parameter in state.parameters.items():
                state.average[name].lerp_(parameter.detach(), 1 - decay)

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
        total = torch.zeros((), device=self.device)
        for part in torch.split(torch.arange(len(batch.rows)), self.state.micro_batch_size):
            with self.accelerator.autocast():
                noised = batch.batch(part, self.images, self.path, self.device)
                losses = losses_of(self.objective, noised, self.network)
            # Over the whole batch, not the part: so the gradients of any split add up to the same.
            loss = losses.sum() / len(batch.rows)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def use_average(self) -> None:
        """Puts the moving average in the place of the weights, if there is one."""
        for name, value in (self.state.average or {}).items():
            self.state.parameters[name].data.copy_(value)


def _optimizer(parameters: dict[str, nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=config.weight_decay,
        fused=True,
    )
