"""Objectives: known answers for the target, the loss and the reference; and one from a user's own file."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import nn

from mitune.config.schema import FinetuneConfig
from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.encoding import TextEncoders
from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.network import rows_counted
from mitune.denoiser.opening.components import Components
from mitune.denoiser.path import path_of
from mitune.errors import MituneError
from mitune.finetuning.adapter import WEIGHTS_FILE, trainable
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw
from mitune.finetuning.network import AdaptedNetwork, fast_layers, open_network
from mitune.finetuning.objectives.base import OBJECTIVES, Batch, Needs, losses_of
from mitune.finetuning.objectives.denoising import Denoising
from mitune.finetuning.run import finetune
from tests.sets import write_set
from tests.test_cli_errors import invoke
from tests.tiny import saved_pipeline

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[1] / "docs"


def batch_of(scheduler, latents, noise, timesteps, **changes):
    ones = torch.ones(len(latents))
    fields = {
        "prompts": [""] * len(latents),
        "conditioning": Conditioning.from_tensors({"encoder_hidden_states": torch.zeros(len(latents), 2, 3)}),
        "weights": ones,
        "advantages": ones,
    }
    fields |= {"latents": latents, "noise": noise, "timesteps": timesteps, "worse": latents}
    return Batch(**(fields | changes), path=path_of(scheduler))


def network_of(network, scheduler):
    return AdaptedNetwork(
        denoiser=NetworkDenoiser(network, path_of(scheduler), CPU), modules={}, text_encoders=None, start=None
    )


def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_that_of_the_scheduler(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    latents, noise = latents_and_noise()
    t = torch.tensor([0, 10, 500, 900, 999])
    velocity = scheduler.get_velocity(latents, noise, t)
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    assert torch.allclose(batch_of(scheduler, latents, noise, t.float()).target, expected, atol=1e-5)


def test_target_of_a_flow_is_noise_minus_latents():
    latents, noise = latents_and_noise()
    batch = batch_of(FlowMatchEulerDiscreteScheduler(shift=3.0), latents, noise, torch.full((5,), 300.0))
    assert torch.equal(batch.target, noise - latents)


class ExactDenoiser(nn.Module):
    """Knows the latents of its one image, so the noise in z is no secret to it; off by one half."""

    dtype = torch.float32

    def __init__(self, scheduler, latents):
        super().__init__()
        self.scheduler, self.latents, self.told = scheduler, latents, None

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        assert not return_dict
        assert encoder_hidden_states.shape == (5, 2, 3)
        self.told = timestep
        shape = (-1, 1, 1, 1)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = (timestep / 1000).view(shape)
            exact = (sample - (1 - sigma) * self.latents) / sigma - self.latents
        else:
            alpha_bar = self.scheduler.alphas_cumprod[timestep.long()].view(shape)
            noise = (sample - alpha_bar.sqrt() * self.latents) / (1 - alpha_bar).sqrt()
            exact = {
                "epsilon": noise,
                "sample": self.latents,
                "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.latents,
            }[self.scheduler.config.prediction_type]
        return (exact + 0.5,)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        DDIMScheduler(prediction_type="sample"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["epsilon", "velocity", "sample", "flow"],
)
def test_loss_of_an_exact_denoiser_is_its_offset_squared_times_the_weight(scheduler):
    latents, noise = latents_and_noise()
    denoiser, t = ExactDenoiser(scheduler, latents), torch.tensor([100.0, 300.0, 500.0, 700.0, 900.0])
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.5])
    batch = batch_of(scheduler, latents, noise, t, weights=weights)
    losses = Denoising()(batch, network_of(denoiser, scheduler))
    assert torch.allclose(losses, 0.25 * weights, atol=1e-3)
    assert torch.equal(denoiser.told, t)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Saved tiny models and their sets, by kind."""
    folder = tmp_path_factory.mktemp("objectives")
    kinds = ("sd", "sd3")
    return {kind: (saved_pipeline(kind, folder / kind), write_set(kind, folder / f"{kind}-set")) for kind in kinds}


def config_of(**changes):
    settings = {"adapter": "lora", "rank": 4, "alpha": 6.0, "batch_size": 4, "iterations": 2, "learning_rate": 1e-2}
    return FinetuneConfig(**(settings | changes))


def opened(world, kind, config):
    """The network with a new adapter, a batch of four, and the prediction of a model that was opened without one."""
    model, folder = world[kind]
    components, images = Components.of(model), TrainingSet.read(folder)
    scheduler = components.scheduler()
    path = path_of(scheduler)
    batch = draw(images, path, 1.0, config, 0).batch(torch.arange(4), images, path, CPU)
    text_encoders = TextEncoders(components.text_pipeline(), [], model.call) if config.text_encoder else None
    denoiser = NetworkDenoiser(components.denoiser(), path, CPU)
    base = AdaptedNetwork(
        denoiser=denoiser, modules={"base": denoiser.network}, text_encoders=text_encoders, start=None
    )
    return open_network(components, config, CPU, None), batch, base


def disturb(network):
    """As if the adapters had been trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(network.modules).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


forms = pytest.mark.parametrize("merged", [False, True], ids=["PEFT's form", "merged"])
adapters = pytest.mark.parametrize(
    ("adapter", "text"),
    [("lora", False), ("dora", False), ("lora", True), ("dora", True)],
    ids=["LoRA", "DoRA", "LoRA with text encoders", "DoRA with text encoders"],
)


@forms
@adapters
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_reference_is_the_prediction_of_the_base(kind, adapter, text, merged, world):
    """Bit for bit, whatever the adapter holds; and that of a new adapter, which has no effect yet, is the same."""
    network, batch, base = opened(world, kind, config_of(adapter=adapter, text_encoder=text))
    with torch.no_grad(), fast_layers(base, merged=False, compiled=False):
        expected = base(batch)
    with fast_layers(network, merged=merged, compiled=False):
        with rows_counted(network.denoiser.network) as rows:
            assert torch.equal(network.reference(batch), expected)
        assert rows == [4]  # one pass
        if adapter == "lora":
            assert torch.equal(network(batch), expected)
        else:  # DoRA's m / ‖V‖ is one but for rounding
            torch.testing.assert_close(network(batch), expected, rtol=1e-5, atol=1e-6)
        disturb(network)
        assert (network(batch) - expected).abs().max() > 1e-3
        assert torch.equal(network.reference(batch), expected)


@forms
@adapters
def test_reference_is_the_prediction_at_the_start(adapter, text, merged, world, tmp_path):
    """Where training goes on from an adapter, the frozen network has that, bit for bit."""
    config = config_of(adapter=adapter, text_encoder=text)
    model, folder = world["sd"]
    first = finetune(model, folder, tmp_path / "first", config).adapter
    _, batch, base = opened(world, "sd", config)
    network = open_network(Components.of(model), config, CPU, first)
    with fast_layers(network, merged=merged, compiled=False), torch.no_grad():
        expected = network(batch)
        assert torch.equal(network.reference(batch), expected)
        assert (expected - base(batch)).abs().max() > 1e-3
        disturb(network)
        trained = network(batch)
        assert torch.equal(network.reference(batch), expected)
        assert torch.equal(network(batch), trained)


@forms
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("later", [False, True], ids=["new adapter", "earlier adapter"])
def test_reference_leaves_prediction_and_gradients_alone(later, adapter, autocast, merged, world):
    network, batch, _ = opened(world, "sd", config_of(adapter=adapter, text_encoder=True))
    disturb(network)
    if later:
        start = {name: parameter.detach().clone() for name, parameter in trainable(network.modules).items()}
        network = replace(network, start=start)
        disturb(network)
    parameters = list(trainable(network.modules).values())

    def prediction_and_gradients(before, after):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if before:
                assert not network.reference(batch).requires_grad
            predicted = network(batch)
            if after:
                network.reference(batch)
        return predicted.detach(), torch.autograd.grad(predicted.square().sum(), parameters)

    with fast_layers(network, merged=merged, compiled=False):
        predicted, gradients = prediction_and_gradients(before=False, after=False)
        for before, after in ((True, False), (False, True)):
            again, others = prediction_and_gradients(before, after)
            assert torch.equal(again, predicted)
            assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_weights_of_a_set_are_those_of_its_loss(micro_batch_size, world, tmp_path):
    """The first row of the history is Σ w_row e_row / B, with the errors e of the model as it was opened."""
    model, _ = world["sd"]
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0, 1.0])  # with mean two
    folder = write_set("sd", tmp_path / "set", weights=weights.tolist())
    config = config_of(batch_size=8, iterations=1, micro_batch_size=micro_batch_size)
    finetune(model, folder, tmp_path / "adapter", config)
    row = json.loads((tmp_path / "adapter" / "training.jsonl").read_text(encoding="utf-8"))

    components, images = Components.of(model), TrainingSet.read(folder)
    path = path_of(components.scheduler())
    drawn = draw(images, path, 1.0, config, 0)
    unet, latents = components.denoiser(), images.latents[drawn.rows]
    noisy = components.scheduler().add_noise(latents, drawn.noise, drawn.timesteps.long())
    told = images.conditioning.rows["encoder_hidden_states"][drawn.rows]
    with torch.no_grad():
        errors = (unet(noisy, drawn.timesteps, told).sample - drawn.noise).square().mean(dim=(1, 2, 3))
    assert row["loss"] == pytest.approx((weights[drawn.rows] / 2 * errors).mean().item(), rel=1e-5)


MINE = """

class Mean(Half):
    def __call__(self, batch, network):
        return super().__call__(batch, network).mean()

class Narrow(Half):
    def __call__(self, batch):
        return batch.weights

class Frozen(Half):
    def __call__(self, batch, network):
        return network.reference(batch).flatten(1).mean(dim=1)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a user's own file: that of the docs, and further objectives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    page = (DOCS / "own-objective.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(page.split("```")[1].removeprefix("python") + MINE, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("mine", None)


def train(world, kind, dataset, objective, output="adapter"):
    settings = {"objective": objective, "rank": 2, "batch_size": 4, "iterations": 2, "learning_rate": 0.01}
    options = [part for name, value in settings.items() for part in ("--set", f"finetune.{name}={value}")]
    call = [part for name, value in world[kind][0].call.items() for part in ("--set", f"model.call.{name}={value}")]
    return invoke("train", dataset, "-m", world[kind][0].name, "--device", "cpu", "-o", output, *options, *call)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_objective_of_a_users_own_file(kind, world, here):
    """A = ½ halves the way to the target: a quarter of the loss while the adapter has no effect, and other weights."""
    for objective, output in (("mine:Half", "half"), ("denoising", "whole")):
        status, shown = train(world, kind, world[kind][1], objective, output)
        assert status == 0, shown
    rows = [json.loads((here / output / "training.jsonl").read_text().splitlines()[0]) for output in ("half", "whole")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"] / 4, rel=1e-4)
    half, whole = (load_file(here / output / WEIGHTS_FILE) for output in ("half", "whole"))
    assert any(not torch.equal(half[name], whole[name]) for name in whole)
    assert "| objective | mine:Half |" in (here / "half" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ("mine:Mean", "returned losses of shape () for a batch of 4 images; return one for each"),
        ("mine:Frozen", "have no gradient; let them depend on network(batch)"),
        ("mine:Narrow", "which is called with (batch, network); let it take these."),
        ("mine:Hal", "has no Hal (did you mean Half?)"),
        ("denoise", "Unknown objective 'denoise' (did you mean denoising?)"),
    ],
)
def test_objective_that_cannot_be_is_refused(objective, sentence, world, here):
    status, shown = train(world, "sd", world["sd"][1], objective)
    assert (status, sentence in shown) == (2, True), shown
    assert not (here / "adapter" / WEIGHTS_FILE).exists()


def test_table_holds_objectives():
    for name in OBJECTIVES.rows:
        assert OBJECTIVES.resolve(name).needs in get_args(Needs)


def test_batch_may_be_replaced_in_part(world):
    network, batch, _ = opened(world, "sd", config_of())
    other = replace(batch, latents=batch.latents + 1)
    assert torch.equal(other.target, batch.target)  # ε
    assert not torch.equal(other.noisy, batch.noisy)
    losses = losses_of(Denoising(), other, network)
    with pytest.raises(MituneError, match="returned losses of shape"):
        losses_of(lambda *_: losses.mean(), other, network)
