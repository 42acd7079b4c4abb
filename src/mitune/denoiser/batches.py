"""Rows of what a network is called with: calls of one constant shape, and each text encoded once.

Sums over a batch of another shape end in other bits. With the denoiser called in batches of one shape and each text
encoded alone, an image is a function of its prompt and its seed, whatever stands beside it in the pipeline's call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mitune.denoiser.arguments import refuse_second_dimension
from mitune.denoiser.network import Family, denoiser_of, family_of
from mitune.denoiser.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows out of many."""

    picked: Tensor
    rows: int

    def of_arguments(self, arguments: Mapping[str, Any], family: Family) -> dict[str, Any]:
        """The picked rows in whatever arguments of the denoiser have them. Raises ModelError where that is unknown."""
        picked: dict[str, Any] = {}
        for name, value in arguments.items():
            if name not in family.shared + family.layered:
                refuse_second_dimension(name, value, self.rows)
            picked[name] = value if name in family.shared else self.of(value, 1 if name in family.layered else 0)
        return picked

    def of(self, value: Any, dimension: int = 0) -> Any:
        """The picked rows of a tensor or of a list with one item a row, also inside a mapping; all else as it is."""
        if isinstance(value, Mapping):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, Tensor) and value.ndim > dimension and value.shape[dimension] == self.rows:
            return value.index_select(dimension, self.picked.to(value.device))
        if isinstance(value, list) and len(value) == self.rows:
            return [value[row] for row in self.picked.tolist()]
        return value

    def back(self, value: Any) -> Any:
        """The picked rows in their places, with zeros in the others."""
        if isinstance(value, list):
            whole = [torch.zeros_like(value[0])] * self.rows
            for row, item in zip(self.picked.tolist(), value, strict=True):
                whole[row] = item
            return whole
        zeros = value.new_zeros(self.rows, *value.shape[1:])
        return zeros.index_copy(0, self.picked.to(value.device), value)


def prediction(output: Any) -> Any:
    """What a denoiser predicts, of its output as a tuple or as a class."""
    return output[0] if isinstance(output, tuple) else output.sample


def skips_layers(kwargs: Mapping[str, Any]) -> bool:
    """Whether this call is the third one of skip-layer guidance (SD3.5), with the prompt alone."""
    return kwargs.get("skip_layers") is not None


@contextmanager
def constant_batches(pipe: Pipeline, size: int) -> Iterator[None]:
    """Whatever batch the pipeline hands its denoiser, the network gets `size` candidates at a time.

    The last of them are filled up with repeats, which are thrown away. Both passes of a candidate stay together, as in
    a pipeline call for `size` candidates.
    """
    denoiser = denoiser_of(pipe)
    family, signature = family_of(denoiser), inspect.signature(denoiser.forward)
    first = next(iter(signature.parameters))

    def in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        rows = len(bound.arguments[first])
        passes = 1 if family.separate_calls or skips_layers(kwargs) else 2
        candidates = rows // passes
        if candidates == size:
            return forward(*args, **kwargs)
        predictions: list[list[Any]] = [[] for _ in range(passes)]
        for start in range(0, candidates, size):
            chunk = torch.arange(start, min(start + size, candidates))
            filled = chunk[torch.arange(size) % len(chunk)]
            part = Rows(torch.cat([filled + i * candidates for i in range(passes)]), rows)
            call = inspect.BoundArguments(signature, part.of_arguments(bound.arguments, family))
            output = forward(*call.args, **call.kwargs)
            for i, whole in enumerate(predictions):
                whole.append(prediction(output)[i * size : i * size + len(chunk)])
        predicted = joined([piece for whole in predictions for piece in whole])
        return (predicted,) if isinstance(output, tuple) else type(output)(sample=predicted)

    with called_through(denoiser, in_parts):
        yield


@contextmanager
def texts_encoded_once(pipe: Pipeline, encoded: dict[Any, Any] | None = None) -> Iterator[None]:
    """Text encoders get each distinct text once, and alone, however many rows of the pipeline's batch repeat it.

    encoded: where their outputs are kept, if the same texts will come again in a later call of the pipeline.
    """
    kept = {} if encoded is None else encoded

    def each_alone(part: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            return forward(*args, **kwargs)  # a language model that writes on is called with embeddings
        keys = []
        for row in range(len(tokens)):
            single = Rows(torch.tensor([row]), len(tokens))
            arguments = [single.of(value) for value in args], single.of(kwargs)
            keys.append((part, _key_of([*arguments[0], *arguments[1].values()])))
            if keys[-1] not in kept:
                kept[keys[-1]] = forward(*arguments[0], **arguments[1])
        return joined([kept[key] for key in keys])

    with ExitStack() as stack:
        for name, part in pipe.components.items():
            if isinstance(part, PreTrainedModel):
                stack.enter_context(called_through(part, functools.partial(each_alone, name)))
        yield


def _key_of(values: list[Any]) -> bytes:
    """The same for the same tensors and settings."""
    parts = [
        value.cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        for value in values
    ]
    return b"|".join(parts)


def joined(parts: list[Any]) -> Any:
    """One output with the rows of all; a language model's cache, which no pipeline reads, stays the first one's."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):  # an output class of transformers
        return type(first)(**{name: joined([part[name] for part in parts]) for name in first})
    if isinstance(first, tuple):
        return tuple(joined(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return first


@contextmanager
def called_through(module: object, wrapper: Callable[..., Any], method: str = "forward") -> Iterator[None]:
    """Has `wrapper` called with the module's method, and its arguments, instead of the method itself.

    For one call of the pipeline: where its parts are offloaded, accelerate puts a method of its own there at the end.
    """
    original = getattr(module, method)
    override = module.__dict__.get(method)  # where accelerate has put one that moves the module to the GPU
    wrapped = functools.wraps(original)(functools.partial(wrapper, original))
    setattr(module, method, wrapped)
    try:
        yield
    finally:
        if module.__dict__.get(method) is wrapped:  # else accelerate's new one stays
            if override is None:
                delattr(module, method)
            else:
                setattr(module, method, override)
