"""How many candidates one call of the denoiser takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mitune.config.schema import PoolConfig
from mitune.denoiser.network import execution_device
from mitune.denoiser.opening.models import Model
from mitune.denoiser.sampling import default_batch_size
from mitune.run.store import read_again, write_json


@dataclass(slots=True)
class BatchSize:
    """The denoiser's batch size, which out of memory may halve; kept in a file, so that a restart goes on with it."""

    value: int
    file: Path | None  # None where the settings name the size

    @classmethod
    def begin(cls, folder: Path, config: PoolConfig, model: Model) -> BatchSize:
        """That of the settings; else that of the file in `folder`, or the device's default."""
        if config.batch_size is not None:
            return cls(config.batch_size, None)
        file = folder / "batch_size.json"
        size = cls(read_again(file, _parse) or default_batch_size(execution_device(model.pipe)), file)
        size.note(size.value)
        return size

    def note(self, used: int) -> None:
        """Goes on with the size that a call has used."""
        self.value = used
        if self.file is not None and read_again(self.file, _parse) != used:
            write_json(self.file, {"batch_size": used})


def _parse(content: bytes) -> int:
    value = json.loads(content)["batch_size"]
    if type(value) is not int or value < 1:
        raise ValueError(value)
    return value
