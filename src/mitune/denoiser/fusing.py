"""A whole model with an adapter merged into its weights."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from mitune.config.schema import ModelConfig
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.adapter_file import adapted_parts
from mitune.denoiser.opening.models import load_model
from mitune.errors import MituneError
from mitune.run.store import unfinished_folder, writing


def check_new(output: Path) -> None:
    """Raises MituneError if there is something where a fused model is to be written."""
    if output.exists():
        raise MituneError(f"{output} exists already; choose another folder for the fused model.")


def export_fused(model: ModelConfig, adapter: Path, output: Path) -> Path:
    """Writes the whole model, in its dtype, with the adapter merged into its weights: a diffusers folder.

    It makes the adapter's images, within rounding, without PEFT. Returns `output`; raises MituneError if that exists,
    or if the adapter is damaged or of another model.
    """
    check_new(output)
    pipe = load_model(replace(model, device="cpu", offload="none", compile=False), adapter=adapter).pipe
    if hasattr(pipe, "fuse_lora") and hasattr(pipe, "unload_lora_weights"):
        pipe.fuse_lora(components=list(adapted_parts(pipe)), safe_fusing=True)
        pipe.unload_lora_weights()
    else:
        denoiser = denoiser_of(pipe)
        for layer in [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]:
            layer.merge(safe_merge=True)
        recurse_remove_peft_layers(denoiser)
    with unfinished_folder(output) as whole, writing(output):
        try:
            pipe.save_pretrained(whole)
        except SafetensorError as error:  # its way to say that the system refused to write
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        whole.replace(output)
    return output
