"""Adapted layers with merged weights are PEFT's own, but for rounding."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mitune.config.schema import FinetuneConfig
from mitune.finetuning.adapter import add_adapter, trainable
from mitune.finetuning.layers import channels_last, merged_layers
from tests.tiny import tiny_sd, tiny_sd3


def adapted(kind, **changes):
    """A denoiser whose adapter changes its output, and arguments of a call."""
    generator = torch.Generator().manual_seed(0)
    denoiser = tiny_sd().unet if kind == "sd" else tiny_sd3().transformer
    add_adapter(denoiser, FinetuneConfig(**({"rank": 4, "alpha": 6.0} | changes)))
    for parameter in trainable({"denoiser": denoiser}).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    width = 16 if kind == "sd" else 32
    told = torch.randn(2, 3, width, generator=generator)
    call = {"encoder_hidden_states": told, "timestep": torch.tensor([3.0, 500.0])}
    if kind == "sd3":
        call["pooled_projections"] = torch.randn(2, 16, generator=generator)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    return denoiser, call | {"hidden_states" if kind == "sd3" else "sample": noisy}


def output_and_gradients(denoiser, call):
    denoiser.zero_grad()
    output = denoiser(**call, return_dict=False)[0]
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in trainable({"denoiser": denoiser}).values()]


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_same_output_and_gradients(kind, adapter):
    denoiser, call = adapted(kind, adapter=adapter)
    with torch.no_grad():
        before = denoiser(**call, return_dict=False)[0]
    output, gradients = output_and_gradients(denoiser, call)
    with merged_layers([denoiser]), channels_last([denoiser]):
        merged, merged_gradients = output_and_gradients(denoiser, call)
        assert not torch.equal(merged, output)  # else nothing was merged
    torch.testing.assert_close(merged, output, rtol=1e-4, atol=1e-5)
    for given, expected in zip(merged_gradients, gradients, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    with torch.no_grad():
        assert torch.equal(denoiser(**call, return_dict=False)[0], before)


@pytest.mark.parametrize(("rank", "merged"), [(64, False), (128, True)])
def test_large_layers_stay_as_they_are(rank, merged):
    """(768, 768): 589,824 products against 3 r · 1,536 and 256 · 768, 491,520 or 786,432."""
    network = nn.ModuleDict({"attn": nn.Linear(768, 768)})
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["attn"]), network)
    with merged_layers([network]):
        assert ("forward" in vars(network["attn"])) is merged
    assert "forward" not in vars(network["attn"])


def test_half_precision_stays_as_it_is():
    denoiser, _ = adapted("sd")
    denoiser.to(torch.bfloat16)
    with merged_layers([denoiser]):
        assert not any("forward" in vars(layer) for layer in denoiser.modules())
