"""The network that a pipeline denoises with, and the one table of what families of them do unlike the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mitune.denoiser.pipeline import DenoiserModule, Pipeline
from mitune.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a family of denoisers does unlike SD and SD3: one call a step for [unconditional; conditional] halves."""

    separate_calls: bool = False  # two calls a step instead, the conditional one first
    conditional_first: bool = False  # the halves are the other way round
    listed: bool = False  # z and output are lists of (C, 1, H, W), one a row
    timestep_name: str = "timestep"
    timestep_factor: float = 1.0  # the denoiser gets factor · t + offset, t the scheduler's timestep
    timestep_offset: float = 0.0
    timestep_setting: str | None = None  # of the denoiser's configuration, a further factor
    negated: bool = False  # the pipeline turns the output's sign before the scheduler takes it
    added_guidance: float = 0.0  # guidance is null + (scale + added) · (conditional − null)
    shared: tuple[str, ...] = ()  # arguments without a batch dimension
    layered: tuple[str, ...] = ()  # arguments with the layers of a text encoder first, and the batch second


_POSITIONS = ("img_ids", "txt_ids")
_FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "AuraFlowTransformer2DModel": Family(timestep_factor=1e-3),
        "ChromaTransformer2DModel": Family(separate_calls=True, timestep_factor=1e-3, shared=_POSITIONS),
        "CogView4Transformer2DModel": Family(separate_calls=True),
        "FluxTransformer2DModel": Family(separate_calls=True, timestep_factor=1e-3, shared=_POSITIONS),
        "HiDreamImageTransformer2DModel": Family(
            timestep_name="timesteps", negated=True, layered=("encoder_hidden_states_llama3",)
        ),
        "HunyuanDiT2DModel": Family(shared=("image_rotary_emb",)),
        "Kandinsky3UNet": Family(added_guidance=1.0),
        "Lumina2Transformer2DModel": Family(
            separate_calls=True, timestep_factor=-1e-3, timestep_offset=1.0, negated=True
        ),
        "PRXTransformer2DModel": Family(timestep_factor=1e-3),
        "QwenImageTransformer2DModel": Family(separate_calls=True, timestep_factor=1e-3),
        "SanaTransformer2DModel": Family(timestep_setting="timestep_scale"),
        "WanTransformer3DModel": Family(separate_calls=True),
        "ZImageTransformer2DModel": Family(
            conditional_first=True, listed=True, timestep_name="t", timestep_factor=-1e-3, timestep_offset=1.0,
            negated=True, added_guidance=1.0,
        ),
    }
)  # fmt: skip


def denoiser_of(pipe: Pipeline) -> DenoiserModule:
    """The network that a diffusers pipeline denoises with: `pipe.unet` or `pipe.transformer`.

    Raises ModelError if there is neither, or a second one that takes over part of the way.
    """
    if isinstance(getattr(pipe, "transformer_2", None), nn.Module):
        raise ModelError(
            f"{type(pipe).__name__} denoises with two transformers in turn, and mitune scores pipelines with one; "
            "take a model of this kind that has one, such as Wan 2.1."
        )
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return cast(DenoiserModule, module)
    raise ModelError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; mitune scores diffusers pipelines that denoise "
        "with one of them."
    )


def execution_device(pipe: Pipeline) -> torch.device:
    """Where the pipeline computes. Its `device` is another one if it is offloaded: that of the parts which wait."""
    return pipe._execution_device


def components_of(pipe: Pipeline) -> Mapping[str, Any]:
    """The parts of a pipeline by name; None where it lacks one."""
    return pipe.components


def save_pipeline(pipe: Pipeline, folder: Path) -> None:
    """Writes a diffusers folder."""
    pipe.save_pretrained(folder)


def without_progress_bar(pipe: Pipeline) -> None:
    """Has the pipeline draw none from here on."""
    pipe.set_progress_bar_config(disable=True)


@contextmanager
def adapters_off(parts: Iterable[object]) -> Iterator[None]:
    """Adapted layers of these modules compute as they did before the adapter, in PEFT's form and in the merged one."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def free_denoiser(pipe: Pipeline) -> None:
    """Has an offloaded denoiser wait again after it was called alone, so that there is room for what comes first in a
    call of the pipeline."""
    pipe.maybe_free_model_hooks()


def compile_denoiser(denoiser: DenoiserModule, device: torch.device) -> None:
    """Has torch.compile make fused kernels of the forward pass, at its first call with inputs of a shape; in place.

    Hooks stay what they are, as they lie around `forward`. Raises ModelError if nothing can be compiled for `device`.
    """
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except RuntimeError as error:
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        raise ModelError(
            f"model.compile finds nothing to compile with for {device}; install {needed}, or leave it out."
        ) from error
    denoiser.forward = torch.compile(denoiser.forward)


@contextmanager
def rows_counted(denoiser: DenoiserModule) -> Iterator[list[int]]:
    """Hands out a list that gets the number of rows of each call of the denoiser."""
    rows: list[int] = []
    handle = denoiser.register_forward_hook(lambda _, __, output: rows.append(len(output[0])))
    try:
        yield rows
    finally:
        handle.remove()


def family_of(denoiser: DenoiserModule) -> Family:
    """The row of the table for this denoiser; that of SD and SD3 if it has none of its own."""
    family = _FAMILIES.get(type(denoiser).__name__, Family())
    if family.timestep_setting is None:
        return family
    return replace(family, timestep_factor=family.timestep_factor * float(denoiser.config[family.timestep_setting]))


def as_tensor(value: Tensor | list[Tensor]) -> Tensor:
    """z or an output, (B, C, H, W), also of a family that has lists of (C, 1, H, W)."""
    return value if isinstance(value, Tensor) else torch.stack(value).squeeze(2)
