"""The state of a fine-tuning between two iterations: one safetensors file, its numbers as JSON in the header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mitune.errors import MituneError
from mitune.store import write_bytes

_HEADER = "mitune"


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """All that the next iteration depends on, besides the settings and the fine-tuning set."""

    parameters: dict[str, nn.Parameter]  # of the adapter, by name
    optimizer: torch.optim.Optimizer  # of those parameters, in that order
    micro_batch_size: int
    average: dict[str, Tensor] | None = None  # exponential moving average of the parameters
    scaler: torch.amp.GradScaler | None = None  # of fp16
    iterations: int = 0  # done
    skipped: int = 0  # of those, left without effect

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        header = {
            "iterations": self.iterations,
            "skipped": self.skipped,
            "micro_batch_size": self.micro_batch_size,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        tensors = {f"parameter/{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"average/{name}": value for name, value in (self.average or {}).items()}
        moments: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            tensors |= {f"{key}/{name}": value for key, value in moments.get(index, {}).items()}
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(file, save(whole, metadata={_HEADER: json.dumps(header)}))

    def load(self, file: Path) -> None:
        """Goes back to a saved state of the same model and settings. Raises MituneError if the file is damaged."""
        header, tensors = _read(file), {}
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no iterator)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            parts.setdefault(kind, {})[parameter] = tensor
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(parts["parameter"][name])
            for name, value in (self.average or {}).items():
                value.copy_(parts["average"][name])
        ...


def iterations_of(file: Path) -> int: ...
