"""The state of a fine-tuning between two iterations: one safetensors file, with its numbers as JSON in the header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mitune.errors import MituneError
from mitune.store import write_bytes


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """All that the next iteration depends on, beside the settings and the fine-tuning set."""

    parameters: dict[str, nn.Parameter]  # of the adapter, by name
    optimizer: torch.optim.Optimizer  # of these parameters, in this order
    micro_batch_size: int
    average: dict[str, Tensor] | None = None  # exponential moving average of the parameters
    scaler: torch.amp.GradScaler | None = None  # of fp16
    iterations: int = 0  # done

    def save(self, file: Path) -> None:
        """Writes the state, whole or not at all."""
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"average/{name}": tensor for name, tensor in (self.average or {}).items()}
        moments = self.optimizer.state_dict()["state"]  # by index; empty as long as every iteration was skipped
        for index, name in enumerate(self.parameters):
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in moments.get(index, {}).items()}
        header = {
            "iterations": self.iterations,
            "micro_batch_size": self.micro_batch_size,
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(file, save(contiguous, metadata={"mitune": json.dumps(header)}))

    def load(self, file: Path) -> None:
        """Returns to a saved state of the same model and settings. Raises MituneError if the file is damaged."""
        header = _header(file)
        moments: dict[int, dict[str, Tensor]] = {}
        order = {name: index for index, name in enumerate(self.parameters)}
        for key, tensor in load_file(file).items():
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
            self.scaler.load_state_dict(header["scaler"])
        self.micro_batch_size = min(self.micro_batch_size, header["micro_batch_size"])
        self.iterations = header["iterations"]


def _header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as opened:  # checks that the file is as long as its tensors need
            header: dict[str, Any] = json.loads(opened.metadata()["mitune"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MituneError(f"The checkpoint {file} is damaged; delete it to start this fine-tuning again.") from error
    return header
