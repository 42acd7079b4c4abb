"""The list of doors: all that mitune uses of a diffusers pipeline, its scheduler and its network, public or private.

Only this package touches a pipeline. What every pipeline has stands in `Pipeline`, what some have in
`OptionalMembers`; a test holds the code to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Settings(Protocol):
    """The frozen settings of a scheduler or a network: each is an attribute, too."""

    def get(self, name: str, default: Any = None, /) -> Any: ...

    def __getitem__(self, name: str, /) -> Any: ...

    def __contains__(self, name: object, /) -> bool: ...

    def __getattr__(self, name: str, /) -> Any: ...


class Scheduler(Protocol):
    """A scheduler of diffusers."""

    timesteps: Any  # a tensor (T,); None for PNDM before its first run
    step: Callable[..., Any]

    @property
    def config(self) -> Settings: ...


class OptionalSchedulerMembers(Protocol):
    """What some schedulers have; `path_of` says which."""

    alphas_cumprod: Tensor  # (T,) of the training's T timesteps
    betas: Tensor  # (T,)
    sigmas: Tensor  # one a step of the run, and the last
    init_noise_sigma: float  # of the first latents: above 1 where they are z₀ + σ ε
    num_inference_steps: int | None  # of the run that it is set to
    prk_timesteps: Any  # PNDM's Runge-Kutta steps


class DenoiserModule(Protocol):
    """The network that a pipeline denoises with, a torch module."""

    @property
    def config(self) -> Settings: ...

    @property
    def dtype(self) -> torch.dtype: ...

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def register_forward_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> RemovableHandle: ...

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> RemovableHandle: ...


class Autoencoder(Protocol):
    """A torch module between pictures and latents, whatever the pipeline calls it."""

    @property
    def dtype(self) -> torch.dtype: ...

    def to(self, dtype: torch.dtype, /) -> Self: ...

    def encode(self, pixels: Tensor, /, *, return_dict: bool) -> Any: ...

    def decode(self, latents: Tensor, /) -> Any: ...


class Pipeline(Protocol):
    """What mitune uses of any diffusers pipeline. The parameters of its class's `__call__` are read as well."""

    scheduler: Scheduler

    @property
    def components(self) -> Mapping[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def _execution_device(self) -> torch.device: ...  # where it computes, also if its parts are offloaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def enable_model_cpu_offload(self, *, device: torch.device | str) -> None: ...

    def enable_sequential_cpu_offload(self, *, device: torch.device | str) -> None: ...

    def maybe_free_model_hooks(self) -> None: ...  # sets up offloading anew, as at the end of a call

    def set_progress_bar_config(self, **options: Any) -> None: ...

    def save_pretrained(self, folder: str | Path, /) -> None: ...


class OptionalMembers(Protocol):
    """What some pipelines have, and `hasattr` or `getattr` asks for."""

    unet: Any  # the network, or
    transformer: Any
    transformer_2: Any  # a second one that takes over part of the way
    text_encoder: Any
    image_processor: Any  # pictures to what an autoencoder reads, by `preprocess`
    vae_scale_factor: int  # pixels to a latent cell, each way
    do_classifier_free_guidance: bool  # in the present call
    guidance_scale: float  # likewise
    _progress_bar_config: dict[str, Any]
    _pack_latents: Callable[..., Tensor]  # into the tokens that its denoiser takes
    encode_prompt: Callable[..., Any]
    load_lora_weights: Callable[..., None]
    save_lora_weights: Callable[..., None]
    fuse_lora: Callable[..., None]
    unload_lora_weights: Callable[..., None]
