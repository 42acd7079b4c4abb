"""A pipeline's call: its arguments are checked when the model is opened, its errors become a sentence when it runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mitune.denoiser.network import denoiser_of
from mitune.denoiser.pipeline import Pipeline
from mitune.errors import MituneError, ModelError, first_line, raised_in

# What mitune itself calls a pipeline with, or with another number of pictures than it counts on.
OURS = {
    "prompt", "prompt_embeds", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt",
    "num_videos_per_prompt", "num_waveforms_per_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "callback", "callback_steps",
}  # fmt: skip


def check_call(pipeline_class: type[Any], call: Mapping[str, Any]) -> None:
    """Raises ModelError for an argument of `model.call` that the pipeline does not take, or would ignore or mistake."""
    taken = set(inspect.signature(pipeline_class.__call__).parameters) - {"self", *OURS}
    if ("height" in call) != ("width" in call):
        raise ModelError("model.call names one of height and width; name both, as pipelines ignore one alone.")
    for name in call:
        if name in OURS:
            raise ModelError(f"model.call names {name}, which mitune gives the pipeline itself; leave it out.")
        if name not in taken:
            close = difflib.get_close_matches(name, taken, n=1) or sorted(taken)
            raise ModelError(
                f"The call of {pipeline_class.__name__} takes no {name}; set in model.call what it does take: "
                f"{', '.join(close)}."
            )
    require_prompts(pipeline_class, call)


def require_prompts(pipeline_class: type[Any], call: Mapping[str, Any]) -> None:
    """Raises ModelError for a pipeline that takes no prompts, or needs more than these and `call`."""
    try:
        inspect.signature(pipeline_class.__call__).bind(None, **{"prompt": "", **call})
    except TypeError as error:
        raise ModelError(
            f"{pipeline_class.__name__} is not called with prompts and model.call alone ({error}); take a "
            "text-to-image model."
        ) from error


@contextmanager
def calling(pipe: Pipeline, call: Mapping[str, Any]) -> Iterator[None]:
    """Turns what a pipeline raises for the arguments of its call into one ModelError; mitune's own faults stay."""
    try:
        yield
    except (MituneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if raised_in(error, {"mitune", "diffusers", "transformers"}) == "mitune":
            raise
        values = {name: value for name, value in call.items() if isinstance(value, str | int | float | list | dict)}
        arguments = ", ".join(f"{name} = {value!r}" for name, value in values.items() if name not in OURS)
        raise ModelError(
            f"{type(pipe).__name__} cannot be called with {arguments or 'its own defaults'} ({type(error).__name__}: "
            f"{first_line(error)}); {_remedy(pipe, call)}."
        ) from error


def _remedy(pipe: Pipeline, call: Mapping[str, Any]) -> str:
    grid = size_grid(pipe)
    off = {name: size for name in ("height", "width") if isinstance(size := call.get(name), int) and size % grid}
    if not off:
        return "set model.call to arguments that go together, or another model.dtype"
    fits = " and ".join(f"{name} = {max(size // grid, 1) * grid}" for name, size in off.items())
    return f"height and width must be multiples of {grid}, e.g. {fits}: set them in model.call, or cut the picture"


def size_grid(pipe: Pipeline) -> int:
    """Pixels that height and width must be multiples of: a cell of the VAE, times the denoiser's patches of these."""
    denoiser = denoiser_of(pipe)
    patch = denoiser.config.get("patch_size") or denoiser.config.get("all_patch_size") or 1
    across = patch if isinstance(patch, int) else patch[-1]
    packed = 2 if hasattr(pipe, "_pack_latents") else 1  # by the pipeline, before the denoiser sees them
    return int(getattr(pipe, "vae_scale_factor", 8)) * max(across, packed)
