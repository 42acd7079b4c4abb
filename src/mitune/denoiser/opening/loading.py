"""While diffusers and transformers open a model: their errors become a sentence, and no weight is made up."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from transformers import PreTrainedModel

from mitune.config.schema import ModelConfig
from mitune.denoiser.pipeline import Pipeline
from mitune.denoiser.quiet import quiet_libraries
from mitune.errors import MituneError, ModelError, first_line
from mitune.run.versions import check_versions
from mitune.worlds.base import embedded_models

log = logging.getLogger(__name__)
SHOWN = 3  # names of weights in a sentence
AGAIN = "save or download the model again, whole, with the config.json that belongs to its weights"


@contextmanager
def opening(config: ModelConfig) -> Iterator[None]:
    """Turns what diffusers and transformers raise for a model that cannot be read into one ModelError.

    Also raises ModelError where a checkpoint lacks weights, which both libraries else fill with random ones.
    """
    check_versions()
    quiet_libraries()
    diffusers.utils.logging.disable_progress_bar()  # loading is quick, and mitune shows bars of its own
    transformers.utils.logging.disable_progress_bar()
    try:
        with ExitStack() as stack:
            for base in (ModelMixin, PreTrainedModel):
                checked = classmethod(_checked(base.from_pretrained.__func__))
                stack.enter_context(mock.patch.object(base, "from_pretrained", checked))
            yield
    except (MituneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"Cannot open the model {config.name!r} ({_reason(error)}); give a hub id, a folder made by "
            "pipe.save_pretrained, a .safetensors file with model.base, or an embedded model "
            f"({', '.join(embedded_models())})."
        ) from error


def _checked(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """The same class method, which asks what came of the checkpoint's weights, and refuses it if some were missing."""

    def checked(cls: type[Any], place: Any, *arguments: Any, **options: Any) -> Any:
        with_info = options.pop("output_loading_info", False)
        part = "/".join(str(name) for name in (place, options.get("subfolder")) if name)
        if issubclass(cls, PreTrainedModel):
            options["ignore_mismatched_sizes"] = True  # else the names are in its log alone
        try:
            module, info = from_pretrained(cls, place, *arguments, output_loading_info=True, **options)
        except Exception as error:
            raise ModelError(f"Cannot open the {cls.__name__} in {part} ({_reason(error)}); {AGAIN}.") from error
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"The weights in {part} lack {_listing(missing)} of a {cls.__name__}; {AGAIN}.")
        if misfits := sorted(str(key[0]) for key in info["mismatched_keys"]):
            raise ModelError(
                f"The weights {_listing(misfits)} in {part} have other sizes than in its config.json; {AGAIN}."
            )
        if unexpected := sorted(info["unexpected_keys"]):
            log.warning("The weights in %s have no place in a %s: %s.", part, cls.__name__, _listing(unexpected))
        return (module, info) if with_info else module

    return checked


def _reason(error: Exception) -> str:
    """Without the advice to programmers that follows."""
    return textwrap.shorten(re.split(r"[.,] If (?:you|this)\b", first_line(error))[0], 250)


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_complete(pipe: Pipeline) -> None:
    """Raises ModelError for a part with weights that were in no file, as a single file may lack some."""
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            missing = sorted(name for name, weight in module.state_dict().items() if weight.is_meta)
            if missing:
                raise ModelError(f"The model's file lacks {_listing(missing)} of {part}; download it again, whole.")
