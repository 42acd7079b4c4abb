"""Opens a pipeline by hub id, by folder, or by the name of an embedded model. Reads safetensors and JSON only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from mitune.config.schema import ModelConfig
from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.network import compile_denoiser, denoiser_of, without_progress_bar
from mitune.denoiser.opening.adapter_file import load_adapter
from mitune.denoiser.opening.calls import check_call, require_prompts
from mitune.denoiser.opening.hub import Source, source_of
from mitune.denoiser.opening.layout import check_files, read_index
from mitune.denoiser.opening.loading import check_complete, opening
from mitune.denoiser.opening.schedulers import scheduler_for
from mitune.denoiser.pipeline import Pipeline
from mitune.errors import ModelError, first_line
from mitune.worlds.base import embedded_model


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded pipeline and the arguments that every call of it gets."""

    pipe: Pipeline
    call: dict[str, Any]
    name: str
    adapter: Path | None = None  # that was loaded onto the base

    @property
    def denoiser(self) -> NetworkDenoiser:
        """The pipeline's network, which gives ε̂."""
        return NetworkDenoiser.of(self.pipe)

    @property
    def steps(self) -> int:
        """Denoiser calls for one image."""
        return int(self._argument("num_inference_steps"))

    @property
    def guidance_scale(self) -> float:
        """The weight of the prompt: the pipeline's own unless the settings name one."""
        return float(self._argument(guidance_name(type(self.pipe))))

    def _argument(self, name: str) -> Any:
        return self.call.get(name, inspect.signature(type(self.pipe).__call__).parameters[name].default)


def model_folder(name: str) -> str:
    """Where a model's files are: the packaged folder of an embedded name, else the name itself (hub id or folder)."""
    embedded = embedded_model(name)
    return name if embedded is None else str(embedded.folder)


def parts_of(config: ModelConfig) -> str:
    """The folder or hub id that lists the parts of the pipeline, and holds their configurations."""
    return config.base or model_folder(config.name)


def guidance_name(pipeline_class: type[Any]) -> str:
    """The argument of the pipeline's call that weighs the pass with the prompt against the one without.

    In pipelines that have true_cfg_scale, guidance_scale is an input of the network, and makes no second pass.
    """
    accepted = inspect.signature(pipeline_class.__call__).parameters
    return "true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale"


def call_arguments(config: ModelConfig, pipeline_class: type[Any] = DiffusionPipeline) -> dict[str, Any]:
    """Arguments of the pipeline's call: the embedded model's defaults, overruled by the settings."""
    embedded = embedded_model(config.name)
    call = {} if embedded is None else dict(embedded.call)
    if config.guidance_scale is not None:
        call[guidance_name(pipeline_class)] = config.guidance_scale
    if config.steps is not None:
        call["num_inference_steps"] = config.steps
    return call | config.call


def prompted(pipe: Pipeline, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call for these prompts: `call`, with its negative prompt for each of them.

    Pipelines with true guidance make no second pass without a negative prompt; they get a blank. Raises ModelError for
    a pipeline that does not take prompts, or not these alone.
    """
    require_prompts(type(pipe), call)
    arguments = {"prompt": list(prompts), **call}
    if guidance_name(type(pipe)) == "true_cfg_scale":
        arguments.setdefault("negative_prompt", " ")
    if isinstance(negative := arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [negative] * len(prompts)
    return arguments


def device_of(config: ModelConfig) -> torch.device:
    """The device that the settings name, or the GPU if there is one. Raises ModelError if torch sees no such device."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if config.device == "auto":
        return torch.device("cuda" if kind is not None and kind.type == "cuda" else "cpu")
    here = ["cpu"]
    if kind is not None:
        here += [kind.type, *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if config.device not in here:
        raise ModelError(
            f"model.device = {config.device} is no device that torch sees here ({', '.join(here)}); set it to one of "
            "these, or to auto."
        )
    return torch.device(config.device)


def load_model(config: ModelConfig, *, adapter: Path | None = None) -> Model:
    """Opens the pipeline, and loads an adapter folder onto it where one is given.

    Raises ModelError, with the remedy, if there is no such model or device, or if the model is not all there.
    """
    device = device_of(config)
    if config.offload != "none" and device.type == "cpu":
        raise ModelError(f"model.offload = {config.offload} needs a GPU; set it to none, or model.device to a GPU.")
    source = source_of(parts_of(config), config.revision)
    index = read_index(source)
    kind = getattr(diffusers, index["_class_name"])
    call = call_arguments(config, kind)
    check_call(kind, call)
    if (scale := call.get(guidance_name(kind))) is not None and not (isinstance(scale, int | float) and scale > 1):
        raise ModelError(
            f"model.call names {guidance_name(kind)} = {scale!r}, which must be above 1: at 1 or below, pipelines skip "
            "the pass without the prompt, and mutual information needs both."
        )
    pipe = open_pipeline(config, source, index)
    pipe.scheduler = scheduler_for(config, pipe.scheduler)
    if adapter is not None:
        load_adapter(pipe, adapter)
    if config.compile:
        compile_denoiser(denoiser_of(pipe), device)
    without_progress_bar(pipe)
    if config.offload == "none":
        pipe.to(device)
    elif config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    return Model(pipe, call, config.name, adapter)


def open_pipeline(
    config: ModelConfig, source: Source, index: Mapping[str, Any], without: Sequence[str] = ()
) -> Pipeline:
    """The pipeline on the CPU, without the parts that its list says it lacks (SD3 without T5), and those named here."""
    dtype = getattr(torch, config.dtype)
    absent = {name: None for name, part in index.items() if part == [None, None]} | dict.fromkeys(without)
    options = {**source.arguments, "variant": config.variant, "dtype": dtype, "use_safetensors": True}
    if not config.is_single_file:
        check_files(source, index, config.variant, without)
        with opening(config):
            return cast(Pipeline, DiffusionPipeline.from_pretrained(source.place, **options, **absent))
    kind = getattr(diffusers, index["_class_name"])
    with opening(config):
        try:
            if hasattr(kind, "from_single_file"):
                _check_single_file(config)
                pipe = kind.from_single_file(
                    config.name, config=source.place, torch_dtype=dtype, **source.arguments, **absent
                )
                check_complete(pipe)
                return cast(Pipeline, pipe)
        except SingleFileComponentError:  # not all parts are in the file: the base has the others
            pass
        name = "unet" if "unet" in index else "transformer"
        parts = absent if name in absent else {name: open_single_denoiser(config, source, index, name), **absent}
        check_files(source, index, config.variant, parts)
        return cast(Pipeline, DiffusionPipeline.from_pretrained(source.place, **options, **parts))


def _check_single_file(config: ModelConfig) -> None:
    if "://" in config.name:
        return  # of the hub, which diffusers downloads
    try:
        with safe_open(config.name, framework="pt") as opened:
            count = len(list(opened.keys()))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"Cannot read {config.name} as a .safetensors file ({first_line(error)}); give the path of a whole one."
        ) from error
    if not count:
        raise ModelError(f"{config.name} holds no weights; download it again.")


def open_single_denoiser(config: ModelConfig, source: Source, index: Mapping[str, Any], name: str) -> Any:
    """The denoiser from a single file, on the CPU. Raises ModelError if diffusers cannot open its kind that way."""
    kind = getattr(diffusers, index[name][1])
    if not hasattr(kind, "from_single_file"):
        raise ModelError(f"diffusers opens no single files of a {kind.__name__}; give a hub id or a folder.")
    _check_single_file(config)
    with opening(config):
        return kind.from_single_file(
            config.name,
            config=source.place,
            subfolder=name,
            torch_dtype=getattr(torch, config.dtype),
            **source.arguments,
        )


def nothing_but_nan(model: Model, what: str) -> ModelError:
    """What to say of a model where `what` is NaN throughout: which of its settings to change."""
    dtype = str(next(denoiser_of(model.pipe).parameters()).dtype).removeprefix("torch.")
    remedy = "its files or its settings are at fault; see what its pipeline makes without mitune."
    if dtype != "float32":
        remedy = "its numbers overflow; set model.dtype to float32 (or bfloat16), in another folder."
    return ModelError(f"{what} came out as NaN, with {model.name} in {dtype}: {remedy}")
