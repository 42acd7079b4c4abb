"""Objectives: what each is least at, by theory, and what images that are equally good change."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from mitune.config.schema import ModelConfig
from mitune.denoiser.conditioning import Conditioning
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.path import path_of
from mitune.denoiser.replay import passes_of
from mitune.errors import MituneError
from mitune.finetuning.adapter import WEIGHTS_FILE, trainable
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw
from mitune.finetuning.network import fast_layers, open_network
from mitune.finetuning.objectives.advantage import Advantage
from mitune.finetuning.objectives.base import OBJECTIVES, Batch, Rivals, per_image
from mitune.finetuning.objectives.denoising import Denoising
from mitune.finetuning.objectives.dpo import BETA, DPO
from mitune.finetuning.objectives.rival_target import STRENGTH, RivalTarget
from mitune.finetuning.objectives.weighted import LARGEST, TEMPERATURE, Weighted
from mitune.finetuning.run import finetune
from mitune.run.store import write_bytes, write_tensors
from mitune.worlds.shapes.prompts import prompt_list
from tests.sets import write_set
from tests.test_objectives import adapters, batch_of, config_of, disturb, forms, opened
from tests.tiny import saved_pipeline

ADVANTAGES = [1.0, 0.5, 0.0, 0.0, -1.0, -0.5]  # of three images of each of two prompts
RANKED = [name for name in OBJECTIVES.rows if OBJECTIVES.resolve(name).needs == "ranked"]
LOG_SNR = -0.7
SCHEDULERS = {
    "epsilon": DDIMScheduler(),
    "velocity": DDIMScheduler(prediction_type="v_prediction"),
    "sample": DDIMScheduler(prediction_type="sample"),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
schedulers = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


def scale_of(batch: Batch) -> torch.Tensor:
    """c of f = c ẑ₀ + (what z says), (B, 1, 1, 1)."""
    alpha, sigma = (per_image(part(batch.timesteps), batch.latents) for part in (batch.path.alpha, batch.path.sigma))
    return {"epsilon": -alpha / sigma, "velocity": -1 / sigma, "sample": torch.ones_like(sigma)}[batch.path.predicts]


class Toy:
    """A network whose denoiser ẑ₀ is a parameter, the same at every z and t; the base's is one a prompt."""

    def __init__(self, denoised, base):
        self.denoised, self.base = denoised, base if isinstance(base, dict) else {"": base}

    def __call__(self, batch):
        return batch.target + scale_of(batch) * (self.denoised - batch.latents)  # as u is what ẑ₀ = z₀ predicts

    def reference(self, batch):
        base = torch.stack([torch.as_tensor(self.base[prompt]).expand_as(batch.latents[0]) for prompt in batch.prompts])
        return batch.target + scale_of(batch) * (base - batch.latents)


def toy_batch(scheduler, latents, z=None, **changes):
    """Latents noised to λ = −0.7, in such a way that all give the same z if there is one."""
    t = path_of(scheduler).timestep(torch.full((len(latents),), LOG_SNR))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    batch = batch_of(scheduler, latents, noise, t, **changes)
    if z is None:
        return batch
    alpha, sigma = (per_image(part(t), latents) for part in (batch.path.alpha, batch.path.sigma))
    return replace(batch, noise=(z - alpha * latents) / sigma)


def gradient(objective, batch, denoised, base):
    """Of the mean loss with respect to the common denoiser."""
    denoised = torch.as_tensor(denoised).clone().requires_grad_()
    (value,) = torch.autograd.grad(objective(batch, Toy(denoised, base)).mean(), denoised)
    return value


@schedulers
@pytest.mark.parametrize("base", [0.4, 1.0], ids=["exact base", "base that is off"])
@pytest.mark.parametrize(
    "objective", [Denoising(), Advantage(), Weighted()], ids=["denoising", "advantage", "weighted"]
)
def test_optimum_of_a_gaussian(objective, base, scheduler):
    """Where z₀ given z is N(m, s²) and A = a (z₀ − m)/s, with a base b: m for the denoising loss; b + E[A (z₀ − b)] =
    b + a s for advantages; and m + a s/τ for weights exp(A/τ), which tilt the Gaussian. The expectation is a sum over
    the nodes of a quadrature, exact but for rounding."""
    m, s, a = 0.4, 0.6, 0.3
    nodes, shares = (torch.tensor(part, dtype=torch.float32) for part in np.polynomial.hermite_e.hermegauss(16))
    assert (a * nodes / TEMPERATURE).exp().max() < LARGEST
    batch = toy_batch(
        scheduler,
        (m + s * nodes).reshape(-1, 1, 1, 1),
        z=0.8,
        weights=len(nodes) * shares / math.sqrt(2 * math.pi),
        advantages=a * nodes,
    )
    assert batch.noisy.std() < 1e-6
    optimum = {Denoising: m, Advantage: base + a * s, Weighted: m + a * s / TEMPERATURE}[type(objective)]
    slope = gradient(objective, batch, optimum + 1.0, base)  # of a parabola, so the gradient at a distance of one
    assert slope > 0.1
    assert gradient(objective, batch, optimum, base).item() == pytest.approx(0, abs=1e-4 * slope.item())


@schedulers
@pytest.mark.parametrize("flipped", [0.1, 0.4])
def test_optimum_of_pairs_with_doubt(flipped, scheduler):
    """ẑ₀ = b + x, of pairs w, l of which a share q is the wrong way round: with shared ε and t, the margin is
    2 c² x g, g the mean of l − w; σ(−β c² x g) = 1 − q at the optimum, so x = −log((1 − q)/q) / (β c² g)."""
    pair = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = 2 * torch.tensor([1 - flipped, flipped])
    batch = toy_batch(scheduler, pair, worse=pair.flip(0), weights=weights)
    batch = replace(batch, noise=batch.noise[:1].expand_as(pair))
    c2, g = scale_of(batch)[0].square().item(), (pair[1] - pair[0]).mean().item()
    assert torch.allclose(DPO()(batch, Toy(0.2, 0.2)), math.log(2) * weights)
    start = gradient(DPO(), batch, 0.2, 0.2).item()
    assert start == pytest.approx(BETA * c2 * g * (1 - 2 * flipped) / 2, rel=1e-3)
    optimum = 0.2 - math.log((1 - flipped) / flipped) / (BETA * c2 * g)
    assert gradient(DPO(), batch, optimum, 0.2).item() == pytest.approx(0, abs=1e-2 * abs(start))


def rivals_of(places, prompts):
    told = Conditioning.from_tensors({"encoder_hidden_states": torch.zeros(len(places), 2, 3)})
    return Rivals(torch.tensor(places), prompts, told)


@schedulers
def test_optimum_among_rivals(scheduler):
    """Where z₀ given z is N(m, s²), and the base predicts b_k for p_k: m + γ₊ (b_0 − Σ E[w_k] b_k), with w_k the share
    of exp(−(α/σ)² (b_k − z₀)²/2) at each node of a quadrature. Without rivals, m."""
    m, s, base = 0.4, 0.6, {"": 0.3, "one": -0.9, "other": 0.1}
    nodes, shares = np.polynomial.hermite_e.hermegauss(16)
    shares /= math.sqrt(2 * math.pi)
    alpha_over_sigma = math.exp(LOG_SNR / 2)
    fits = np.exp(-0.5 * (alpha_over_sigma * (np.array([*base.values()])[:, None] - m - s * nodes)) ** 2)
    expected = (fits / fits.sum(axis=0)) @ shares
    optimum = m + STRENGTH * (base[""] - expected @ np.array([*base.values()]))
    assert abs(optimum - m) > 0.05
    latents = torch.tensor(m + s * nodes, dtype=torch.float32).reshape(-1, 1, 1, 1)
    batch = toy_batch(scheduler, latents, z=0.8, weights=torch.tensor(16 * shares, dtype=torch.float32))
    rivals = rivals_of([*range(16), *range(16)], ["one"] * 16 + ["other"] * 16)
    slope = gradient(RivalTarget(), replace(batch, rivals=rivals), optimum + 1.0, base).item()
    for held_against, least in ((rivals, optimum), (rivals_of([], []), m), (rivals_of([3], [""]), m)):
        remaining = gradient(RivalTarget(), replace(batch, rivals=held_against), least, base).item()
        assert remaining == pytest.approx(0, abs=1e-4 * slope)


@pytest.mark.parametrize("name", OBJECTIVES.rows)
def test_same_gradient_of_the_common_denoiser_whatever_is_predicted(name):
    """But for c², by which the model weighs noise levels; for the logistic loss, where it starts."""
    objective = OBJECTIVES.resolve(name)
    generator = torch.Generator().manual_seed(0)
    latents, worse = torch.randn(2, 6, 4, 8, 8, generator=generator)
    changes = {"worse": worse, "advantages": torch.tensor(ADVANTAGES), "weights": torch.tensor([2.0, 1, 0, 1, 1, 1])}
    base, *others = torch.randn(4, 4, 8, 8, generator=generator)
    denoised = base if name == "dpo" else base + 0.3 * others[0]
    bases = {"": base, "one": base + 0.1 * others[1], "other": base + 0.1 * others[2]}
    changes["rivals"] = rivals_of([0, 0, 3], ["one", "other", "one"])
    gradients = []
    for scheduler in SCHEDULERS.values():
        batch = toy_batch(scheduler, latents, **changes)
        gradients.append(gradient(objective, batch, denoised, bases) / scale_of(batch)[0].square())
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())


def test_large_advantages_have_bounded_weights():
    batch = toy_batch(DDIMScheduler(), torch.zeros(3, 1, 1, 1), advantages=torch.tensor([-200.0, 0.0, 200.0]))
    expected = Denoising()(batch, Toy(0.5, 0.0)) * torch.tensor([0.0, 1.0, LARGEST])
    torch.testing.assert_close(Weighted()(batch, Toy(0.5, 0.0)), expected)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved tiny model, and its set with advantages."""
    folder = tmp_path_factory.mktemp("optima")
    return {"sd": (saved_pipeline("sd", folder / "sd"), write_set("sd", folder / "set", advantages=ADVANTAGES))}


def gradients(objective, batch, network):
    losses = objective(batch, network)
    return losses, torch.autograd.grad(losses.mean(), list(trainable(network.modules).values()))


@forms
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_equal_images_change_nothing(adapter, merged, world):
    """Without advantages the gradient is zero at the start. With advantages that sum to zero over one image, noised
    once, it is but for rounding; and with any images it is half the difference of two denoising gradients."""
    network, batch, _ = opened(world, "sd", config_of(adapter=adapter))
    rounding = 0 if adapter == "lora" else 1e-5  # DoRA's m / ‖V‖ is one but for rounding
    with fast_layers(network, merged=merged, compiled=False):
        _, denoising = gradients(Denoising(), batch, network)
        size = max(part.abs().max() for part in denoising)
        losses, none = gradients(Advantage(), replace(batch, advantages=torch.zeros(4)), network)
        assert losses.max() <= rounding
        assert max(part.abs().max() for part in none) <= rounding * size
        once = {name: getattr(batch, name)[:1].expand_as(getattr(batch, name)) for name in ("latents", "noise")}
        once |= {"timesteps": batch.timesteps[:1].expand(4), "conditioning": batch.conditioning.take([0] * 4)}
        same = replace(batch, **once, advantages=torch.tensor([1.0, 0.5, -1.25, -0.25]))
        _, drift = gradients(Advantage(), same, network)
        assert max(part.abs().max() for part in drift) <= 1e-5 * size
        _, apart = gradients(Advantage(), replace(batch, advantages=torch.tensor([1.0, 1.0, -1.0, -1.0])), network)
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
        _, expected = gradients(Denoising(), replace(batch, weights=signs), network)
        assert all(torch.allclose(one, other, atol=1e-5 * size) for one, other in zip(apart, expected, strict=True))


@adapters
def test_gradient_is_the_same_in_both_forms_of_the_layers(adapter, text, world):
    network, batch, _ = opened(world, "sd", config_of(adapter=adapter, text_encoder=text))
    disturb(network)
    batch = replace(batch, advantages=torch.tensor([1.0, 0.5, -1.0, -0.5]))
    plain, plain_gradients = gradients(Advantage(), batch, network)
    with fast_layers(network, merged=True, compiled=False):
        merged, merged_gradients = gradients(Advantage(), batch, network)
    torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-6)
    for given, expected in zip(merged_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@forms
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_image_without_a_worse_one_counts_log_two_without_gradient(adapter, merged, world):
    network, batch, _ = opened(world, "sd", config_of(adapter=adapter))
    disturb(network)
    with fast_layers(network, merged=merged, compiled=False):
        losses, none = gradients(DPO(), replace(batch, worse=batch.latents), network)
        assert torch.allclose(losses, math.log(2) * batch.weights) and losses.requires_grad
        assert not any(part.any() for part in none)
        one = replace(batch, worse=torch.cat([batch.latents[:3], batch.latents[:1] + 1]))
        losses, some = gradients(DPO(), one, network)
        assert losses[3] != losses[0] and any(part.any() for part in some)


@pytest.mark.parametrize(
    ("adapter", "precision"), [("lora", "no"), ("dora", "no"), ("dora", "bf16")], ids=["LoRA", "DoRA", "DoRA, bf16"]
)
@pytest.mark.parametrize("objective", RANKED)
def test_training_on_a_ranked_set(objective, adapter, precision, world, tmp_path):
    """Changes the adapter; in merged layers, and with bf16 in PEFT's."""
    config = config_of(objective=objective, adapter=adapter, precision=precision, micro_batch_size=2)
    finetune(*world["sd"], tmp_path, config)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert all(0 < loss < 4 for loss in losses) and losses[0] != losses[1]


@pytest.mark.parametrize("objective", RANKED)
def test_set_without_advantages_is_refused(objective, world, tmp_path):
    model, _ = world["sd"]
    with pytest.raises(MituneError, match=f"{objective} needs a ranked set, with an"):
        finetune(model, write_set("sd", tmp_path / "set"), tmp_path / "adapter", config_of(objective=objective))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_random_advantages_do_not_drift(tmp_path):
    """Weights that are all positive soon raise ‖Δε‖ by what one's own guided images have in common, though they say
    nothing of the images; advantages leave it out."""
    model, prompts = ModelConfig(name="shapes-sd", device="cpu"), [listed.text for listed in prompt_list("complex")]
    sampler, generator = load_model(model), torch.Generator().manual_seed(0)
    sampler.pipe.set_progress_bar_config(disable=True)
    call = dict(sampler.call) | {"guidance_scale": 4.0, "num_inference_steps": 8, "output_type": "latent"}
    prompts = [prompt for prompt in prompts[:16] for _ in range(4)]
    advantages = torch.rand(16, 4, generator=generator)
    advantages = (advantages - advantages.mean(dim=1, keepdim=True)).flatten()
    passes = passes_of(sampler.pipe, prompts, sampler.call)
    rows = [{"prompt": prompt, "advantage": a} for prompt, a in zip(prompts, advantages.tolist(), strict=True)]
    write_tensors(
        tmp_path / "latents.safetensors", {"latents": sampler.pipe(prompts, **call, generator=generator).images}
    )
    write_tensors(tmp_path / "conditioning.safetensors", passes.to_tensors())
    write_bytes(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    config = config_of(rank=8, alpha=8.0, batch_size=16, iterations=40, learning_rate=1e-3, timesteps=(0.5, 1.0))
    images, components = TrainingSet.read(tmp_path), Components.of(model)

    def difference(adapter):
        """‖Δε‖ at the same noised images."""
        network = open_network(components, config, torch.device("cpu"), adapter)
        path, every = network.denoiser.path, torch.arange(64)
        drawn = draw(images, path, 1.0, replace(config, batch_size=64), 1000)
        with torch.no_grad():
            batch = drawn.batch(every, images, path, torch.device("cpu"))
            return (network(batch) - network(replace(batch, conditioning=passes.null.take(drawn.rows)))).norm()

    changes = {}
    for objective in ("advantage", "weighted"):
        finetune(model, tmp_path, tmp_path / objective, replace(config, objective=objective))
        changes[objective] = (difference(tmp_path / objective) / difference(None) - 1).item()
    assert changes["weighted"] > 0.08
    assert abs(changes["advantage"]) < 0.01
