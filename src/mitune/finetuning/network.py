"""The denoiser with its adapter, and with those of its text encoders: what an objective is given, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.encoding import TextEncoders
from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.network import adapters_off, compile_denoiser
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import call_arguments
from mitune.denoiser.path import path_of
from mitune.denoiser.pipeline import DenoiserModule
from mitune.errors import MituneError, first_line
from mitune.finetuning.adapter import add_adapter, check_rank, load_weights, trainable
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import Draw
from mitune.finetuning.layers import channels_last, merged_layers
from mitune.finetuning.objectives.base import Batch
from mitune.run.stopping import signals_held


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdaptedNetwork:
    """A `Network` of the objectives. All stays in evaluation mode, as it was opened: dropout would make an iteration
    depend on more than its seed."""

    denoiser: NetworkDenoiser
    modules: Mapping[str, nn.Module]  # those with an adapter, by component name: the denoiser's network, text encoders
    text_encoders: TextEncoders | None  # None where the prompts' conditioning is that of the set
    start: Mapping[str, Tensor] | None  # the adapters' weights at the start, by name; None where they are new

    def __call__(self, batch: Batch) -> Tensor:
        """The prediction with the adapters, (B, C, H, W), float32."""
        conditioning = batch.conditioning
        if self.text_encoders is not None:
            conditioning = self.text_encoders(batch.prompts, conditioning)
        return self.denoiser.prediction(batch.noisy, batch.timesteps, conditioning)

    def reference(self, batch: Batch) -> Tensor:
        """The prediction before the training, (B, C, H, W), float32, without gradients: of the model that made the
        images, without any adapter or with the one that the training goes on from."""
        with torch.no_grad(), self._before():
            return self(batch)

    @contextmanager
    def _before(self) -> Iterator[None]:
        if self.start is None:
            with adapters_off(self.modules.values()):
                yield
            return
        parameters = trainable(self.modules)
        present = {name: parameter.data for name, parameter in parameters.items()}
        cached = torch.is_autocast_cache_enabled()
        with signals_held():  # a checkpoint is of the present weights
            try:
                # What autocast has rounded of a weight it takes for the same parameter again, whatever is in it by now.
                torch.set_autocast_cache_enabled(False)
                for name, value in self.start.items():
                    parameters[name].data = value
                yield
            finally:
                for name, value in present.items():
                    parameters[name].data = value
                torch.set_autocast_cache_enabled(cached)


def open_network(
    components: Components, config: FinetuneConfig, device: torch.device, start_from: Path | None
) -> AdaptedNetwork:
    """Opens denoiser and, if the settings say so, text encoders, and gives each an adapter: new, or that of a folder.

    Raises MituneError for a rank that is too large, and an adapter to start from that does not fit.
    """
    modules = {components.denoiser_name: components.denoiser()}
    text_encoders = None
    if config.text_encoder:
        call = call_arguments(components.config)
        text_encoders = TextEncoders(components.text_pipeline(), components.text_encoder_names, call)
        modules |= text_encoders.modules
    for module in modules.values():
        check_rank(module, config.rank)
        add_adapter(module, config)
    if start_from is not None:
        load_weights(start_from, modules)
    network = cast(DenoiserModule, modules[components.denoiser_name].to(device))
    denoiser = NetworkDenoiser(network, path_of(components.scheduler()), device)
    if text_encoders is not None:
        text_encoders.to(device)
    start = None
    if start_from is not None:
        start = {name: parameter.detach().clone() for name, parameter in trainable(modules).items()}
    return AdaptedNetwork(denoiser=denoiser, modules=modules, text_encoders=text_encoders, start=start)


def check_fit(network: AdaptedNetwork, images: TrainingSet, model: str) -> None:
    """One image through the network: a set of another model has latents or embeddings of other shapes.

    Raises MituneError if it is one.
    """
    denoiser, rows, latents = network.denoiser, torch.zeros(1, dtype=torch.long), images.latents[:1]
    timesteps = torch.full((1,), 0.5 * denoiser.path.training_steps)
    only = Draw(rows, torch.zeros_like(latents), timesteps, rows, torch.empty(1, 0))
    batch = only.batch(rows, images, denoiser.path, denoiser.device)
    misfit = f"The set does not fit the {type(denoiser.network).__name__} of {model}"
    try:
        with torch.no_grad():
            predicted = denoiser.prediction(batch.latents, batch.timesteps, batch.conditioning)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every family has errors of its own
        raise MituneError(f"{misfit} ({first_line(error)}); name the model that made it with --model.") from error
    if predicted.shape != latents.shape:
        shapes = f"{tuple(latents.shape[1:])} in, {tuple(predicted.shape[1:])} out"
        raise MituneError(f"{misfit} (latents {shapes}); name the model that made it with --model.")
    if network.text_encoders is not None:
        _check_text(network.text_encoders, batch)


def _check_text(text_encoders: TextEncoders, batch: Batch) -> None:
    """The prompts must still give the conditioning that the images were made with, in shape at least."""
    with torch.no_grad():
        encoded = text_encoders(batch.prompts, batch.conditioning)
    for name, tensor in encoded.rows.items():
        cached = batch.conditioning.rows[name]
        if tensor.shape[1:] != cached.shape[1:]:
            raise MituneError(
                f"The prompts give {name} of shape {tuple(tensor.shape[1:])}, but the set holds "
                f"{tuple(cached.shape[1:])}; set model.call as it was when the set was made."
            )


@contextmanager
def fast_layers(network: AdaptedNetwork, *, merged: bool, compiled: bool) -> Iterator[None]:
    """Faster layers for the time of training; the modules come out as PEFT and diffusers know them."""
    modules = list(network.modules.values())
    with ExitStack() as stack:
        stack.enter_context(channels_last(modules))
        if merged:
            stack.enter_context(merged_layers(modules))
        if compiled:  # last, as it is to find the layers as they are now
            compile_denoiser(network.denoiser.network, network.denoiser.device)
            stack.callback(delattr, network.denoiser.network, "forward")
        yield
