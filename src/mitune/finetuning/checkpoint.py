"""The state of a fine-tuning between two iterations: one safetensors file, with its numbers as JSON in its notes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mitune.run.sealed import pack, unpack
from mitune.run.store import read_again, write_bytes

_NUMBERS = ("iterations", "skipped", "lost", "lost_in_a_row", "micro_batch_size")


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """All that the next iteration depends on, beside the settings and the fine-tuning set."""

    parameters: dict[str, nn.Parameter]  # of the adapter, by name
    optimizer: torch.optim.Optimizer  # of these parameters, in this order
    micro_batch_size: int
    average: dict[str, Tensor] | None = None  # exponential moving average of the parameters
    scaler: torch.amp.GradScaler | None = None  # of fp16
    iterations: int = 0  # done
    skipped: int = 0  # of these, the ones without effect, because loss or gradient was not finite
    lost: int = 0  # of these, the ones that were skipped or had a loss no working model has
    lost_in_a_row: int = 0  # of the last ones

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average/{name}": tensor for name, tensor in (self.average or {}).items()}
        moments = self.optimizer.state_dict()["state"]  # by index; empty as long as every iteration was skipped
        for index, name in enumerate(self.parameters):
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in moments.get(index, {}).items()}
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {
            "scaler": self.scaler.state_dict() if self.scaler else {}
        }
        write_bytes(file, pack(tensors, {"mitune": json.dumps(numbers)}))

    def load(self, file: Path) -> None:
        """Returns to a saved state of the same model and settings, if there is one.

        A damaged file is set aside, with a warning, and this state stays the first one.
        """
        saved = read_again(file, _parse)
        if saved is None:
            return
        tensors, numbers = saved
        moments: dict[int, dict[str, Tensor]] = {}
        order = {name: index for index, name in enumerate(self.parameters)}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                self.parameters[name].data.copy_(tensor)
            elif kind == "average" and self.average is not None:
                self.average[name].copy_(tensor)
            else:
                moments.setdefault(order[name], {})[kind] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler:
            self.scaler.load_state_dict(numbers["scaler"])
        smallest = min(self.micro_batch_size, numbers["micro_batch_size"])
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self.micro_batch_size = smallest


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, notes = unpack(content, ours=True)
    return tensors, json.loads(notes["mitune"])
