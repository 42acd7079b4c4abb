"""Faster forms of a denoiser's layers for the time of its training; what they compute stays the same.

PEFT adds the adapter's output to that of the frozen layer, in several passes over the activations. Where the weight
matrix is small, it is cheaper to add up the weights, and to go over the activations once:

    y = x Vᵀ + b               V = W + s B A, A: (r, in), B: (out, r)              LoRA, arXiv 2106.09685, eq. (3)
    y = x (m V / ‖V‖)ᵀ + b     ‖V‖ of each row; its gradient is left out           DoRA, arXiv 2402.09353, eq. (5)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

_NAME = "default"  # PEFT's name of an adapter that was given none


@contextmanager
def merged_layers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Adapted layers compute with merged weights, where that is cheaper; PEFT's own way comes back at the end."""
    layers = [
        layer
        for module in modules
        for layer in module.modules()
        if isinstance(layer, lora.Linear) and _is_worth_merging(layer)
    ]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # an attribute of the object, which hides the method
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_worth_merging(layer: Any) -> bool:
    weight = layer.base_layer.weight
    # In half precision, the sum would lose the adapter's part in rounding.
    if weight.dtype != torch.float32:
        return False
    # A row of x costs in · out products more for the gradient of V, but 3 r (in + out) less for A and B, and saves some
    # seven reads and writes of each output, which are taken to be worth 256 products; timed on a CPU alone.
    outputs, inputs = weight.shape
    return bool(outputs * inputs <= 3 * layer.r[_NAME] * (inputs + outputs) + 256 * outputs)


def _forward(layer: Any, x: Tensor) -> Tensor:
    if layer.disable_adapters:
        return F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    weight, a, b = layer.base_layer.weight, layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    merged = torch.addmm(weight, b, a, alpha=layer.scaling[_NAME])
    if _NAME in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[_NAME].weight
        merged = merged * (magnitude / merged.detach().norm(dim=1)).unsqueeze(1)
    return F.linear(x, merged, layer.base_layer.bias)


@contextmanager
def channels_last(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Convolutions keep their weights in the layout that their kernels work in, and so do the activations."""
    weights = [layer.weight for module in modules for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()
