"""Every family of models, on tiny pipelines of the real classes: scores, pruning, training and adapters.

`python -m pytest tests/test_families.py --support-table docs/support.md` writes what passed into the docs.
"""

import functools
import inspect
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from peft import PeftModel

from mitune.config.schema import FinetuneConfig, ModelConfig, PoolConfig
from mitune.denoiser.batches import called_through
from mitune.denoiser.epsilon import NetworkDenoiser
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.adapter_file import load_adapter
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import Model, load_model, prompted
from mitune.denoiser.path import path_of
from mitune.denoiser.pictures import decode, encode_images
from mitune.denoiser.probe import MIProbe
from mitune.errors import GuidanceError, MituneError, ModelError
from mitune.finetuning.adapter import WEIGHTS_FILE, add_adapter, save_adapter, trainable
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw, shift_of
from mitune.finetuning.network import AdaptedNetwork
from mitune.finetuning.objectives.denoising import Denoising
from mitune.finetuning.run import finetune
from mitune.information import get_score
from mitune.pool.build import build_pool
from mitune.run.seals import SEAL
from mitune.scoring import score
from tests.families import CASES, PICTURE, PROMPTS, TEXT, flux
from tests.tiny import tiny_sd3

STEPS, SCALE = 5, 3.0
PICTURES = {name: case for name, case in CASES.items() if case.makes == "pictures"}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
pictures = pytest.mark.parametrize("case", PICTURES.values(), ids=PICTURES.keys())


def call(pipe, case, *, count=2, **more):
    """Final latents of a guided run of two prompts, or of `count` candidates of them."""
    given = {name: value for name, value in case.call.items()}
    if "prompt" in given:  # embeddings instead
        given = {k: v[: count if count < 2 else 2] if torch.is_tensor(v) else v for k, v in given.items()}
    arguments = prompted(pipe, [PROMPTS[i % 2] for i in range(count)], given)
    arguments |= {"num_inference_steps": STEPS, "output_type": "latent", case.guidance: SCALE}
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(**arguments | more)[0]


class Witness:
    """What the denoiser gets and gives, and what the scheduler is handed, without mitune."""

    def __init__(self, pipe, case):
        self.case, self.calls, self.guided = case, [], []
        self.denoiser = getattr(pipe, "transformer", None) or pipe.unet
        self.denoiser.register_forward_hook(self.note, with_kwargs=True)
        step = pipe.scheduler.step

        @functools.wraps(step)  # pipelines ask it whether it takes a generator
        def noted(output, *args, **kwargs):
            self.guided.append(output.detach().double())
            return step(output, *args, **kwargs)

        pipe.scheduler.step = noted

    def note(self, _module, args, kwargs, output):
        z = args[0] if args else next(kwargs[name] for name in ("hidden_states", "sample") if name in kwargs)
        t = next(
            (kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs),
            args[1] if len(args) > 1 else None,
        )
        z, out = ((torch.stack(x).squeeze(2) if isinstance(x, list) else x) for x in (z, output[0]))
        self.calls.append((z.double(), torch.as_tensor(t).double().flatten()[0].item(), out.double()))

    def steps(self):
        """(z, t as told, conditional, null) of each step; outputs with the sign that the scheduler wants."""
        for i in range(0, len(self.calls), 2 if self.case.separate else 1):
            z, t, output = self.calls[i]
            if self.case.separate:
                conditional, null = output, self.calls[i + 1][2]
            else:
                z = z.chunk(2)[0]
                null, conditional = output.chunk(2)[:: -1 if self.case.conditional_first else 1]
            channels = z.shape[1]
            sign = self.case.sign
            yield z, t, sign * conditional[:, :channels], sign * null[:, :channels]


def levels(scheduler, steps):
    """α and σ of the steps and what the network predicts, from the scheduler's own tables."""
    if hasattr(scheduler.config, "use_flow_sigmas") and not scheduler.config.use_flow_sigmas:
        alpha = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()].sqrt()
        return alpha, (1 - alpha**2).sqrt(), scheduler.config.prediction_type
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        alpha = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()].sqrt()
        return alpha, (1 - alpha**2).sqrt(), scheduler.config.prediction_type
    sigma = scheduler.sigmas[:steps].double()
    return 1 - sigma, sigma, "flow"


def noise_and_clean(z, output, alpha, sigma, predicts):
    if predicts == "epsilon":
        return output, (z - sigma * output) / alpha
    if predicts == "v_prediction":
        return sigma * z + alpha * output, alpha * z - sigma * output
    return z + alpha * output, z - sigma * output


@cases
def test_scoring(case):
    """Scores are those of sums made by hand, and their parts, put together, are what the pipeline's scheduler gets."""
    pipe = case.make()
    witness = Witness(pipe, case)
    with MIProbe(pipe, guidance_scale=SCALE) as probe:
        latents = call(pipe, case)
    trace = probe.trace(latents)
    assert torch.equal(latents, call(pipe, case))  # watching changes nothing, and the hook is gone
    del witness.calls[len(witness.calls) // 2 :], witness.guided[STEPS:]
    alpha, sigma, predicts = levels(pipe.scheduler, STEPS)
    differences, errors = [], []
    steps = zip(witness.steps(), witness.guided, pipe.scheduler.timesteps, alpha, sigma, strict=True)
    for (z, told, conditional, null), guided, t, a, s in steps:
        assert told == pytest.approx(case.told(float(t)), rel=1e-5)
        combined = null + (SCALE + case.added) * (conditional - null)
        if case.rescaled:
            combined = combined * conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(guided[:, : combined.shape[1]], combined, rtol=1e-3, atol=1e-3)
        epsilon, _ = noise_and_clean(z, conditional, a, s, predicts)
        epsilon_null, _ = noise_and_clean(z, null, a, s, predicts)
        noise = (z - a * latents.double()) / s
        differences.append((epsilon - epsilon_null).square().flatten(1).sum(dim=1))
        errors.append((epsilon - noise).square().flatten(1).sum(dim=1))
    differences, errors = torch.stack(differences, dim=1), torch.stack(errors, dim=1)
    assert (differences[:, 1:] > 0).all()
    torch.testing.assert_close(trace.difference.double(), differences, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(trace.error_conditional.double(), errors, rtol=5e-3, atol=1e-3)
    assert trace.dot_guided.isfinite().all()
    log_snr = 2 * (alpha / sigma).log()
    kept = log_snr.isfinite() & (sigma / (alpha + sigma) > 0.05)
    by_hand = np.trapezoid(0.5 * differences[:, kept].numpy(), log_snr[kept].numpy(), axis=1)
    assert get_score("mi-tune")(trace).tolist() == pytest.approx(by_hand.tolist(), rel=5e-3)


@cases
def test_scoring_afterwards(case):
    """The denoiser, called alone with what the probe has kept, says what it said in the pipeline; scores come of it."""
    pipe = case.make()
    witness = Witness(pipe, case)
    with MIProbe(pipe) as probe:
        latents = call(pipe, case)
    z, _, conditional, null = list(witness.steps())[1]
    t = pipe.scheduler.timesteps[1].float().expand(2)
    with torch.no_grad():
        for told, output in ((probe.conditioning, conditional), (probe.null_conditioning, null)):
            replayed = NetworkDenoiser.of(pipe).prediction(z.float(), t, told)
            torch.testing.assert_close(replayed.double(), output, rtol=1e-4, atol=1e-5)
    result = score(pipe, latents, PROMPTS, draws=4, call=case.call)
    assert result.draws.shape == (2, 1, 2)
    assert (result.draws > 0).all()  # of the orthogonal estimator
    torch.testing.assert_close(result.maps.flatten(1).sum(dim=1), result.draws.mean(dim=(1, 2)), rtol=1e-3, atol=0)


def row_by_row(denoiser):
    """Makes the network compute each row alone: sums over a batch of another size end in other bits."""
    forward = denoiser.forward
    signature = inspect.signature(forward)

    def picked(value, row, rows, name=""):
        if name == "encoder_hidden_states_llama3":  # of all layers
            return value[:, row : row + 1]
        if isinstance(value, dict):
            return {name: picked(item, row, rows) for name, item in value.items()}
        if isinstance(value, (torch.Tensor, list)) and not (torch.is_tensor(value) and value.ndim == 0):
            return value[row : row + 1] if len(value) == rows else value
        return value

    @functools.wraps(forward)
    def each(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        rows = len(next(iter(given.values())))
        outputs = []
        for row in range(rows):
            told = {k: v if k in ("img_ids", "txt_ids") else picked(v, row, rows, k) for k, v in given.items()}
            outputs.append(forward(**told)[0])
        return (
            [item for output in outputs for item in output] if isinstance(outputs[0], list) else torch.cat(outputs),
        )

    denoiser.forward = each


@cases
def test_pruning(case):
    """All candidates but the last are dropped after the second step: the last comes out the same, bit for bit."""
    pipe = case.make()
    count = 2 if "prompt" in case.call else case.candidates
    batches = []

    def drop(probe):
        batches.append(len(probe.candidates))
        if probe.steps == 2:
            probe.keep([count - 1])

    def both():
        with MIProbe(pipe) as probe:
            whole = call(pipe, case, count=count)
        unpruned = probe.trace(whole)
        with MIProbe(pipe, on_step=drop) as probe:
            latents = call(pipe, case, count=count)
        return whole[-1], latents[-1], unpruned.difference[-1:], probe.trace(latents).difference

    expected, latents, *_ = both()
    assert batches == [count] * 2 + [1] * (STEPS - 2)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    row_by_row(denoiser_of(pipe))
    expected, latents, unpruned, pruned = both()
    assert torch.equal(latents, expected)
    torch.testing.assert_close(pruned, unpruned)


@pictures
def test_training(case, tmp_path):
    """Prompts → pool → set → one iteration → adapter, which, once loaded, has a lower loss on the same batch."""
    folder = tmp_path / "model"
    case.make().save_pretrained(folder)
    config = ModelConfig(name=str(folder), device="cpu", guidance_scale=SCALE, steps=STEPS, call=case.call)
    model = load_model(config)
    pool = build_pool(model, PROMPTS, tmp_path / "pool", PoolConfig(candidates=4, batch_size=2, seed=1))
    assert pool.denoiser_calls < pool.unraced_calls
    scores = np.array(pq.read_table(pool.table)["score.contrast"]).reshape(len(PROMPTS), 4)
    assert (np.isfinite(scores).sum(axis=1) == 2).all()
    assert len(list(pool.sets["contrast"].glob("*.png"))) == len(PROMPTS)
    images = TrainingSet.read(pool.sets["contrast"])
    settings = FinetuneConfig(adapter="lora", rank=4, alpha=4.0, batch_size=4, iterations=1, learning_rate=1e-3)
    done = finetune(config, pool.sets["contrast"], tmp_path / "adapter", settings)
    tuned = load_model(config, adapter=done.adapter)
    scheduler = Components.of(config).scheduler()
    path, cpu = path_of(scheduler), torch.device("cpu")
    drawn = draw(images, path, shift_of(scheduler), settings, 0)
    batch = drawn.batch(torch.arange(len(drawn.rows)), images, path, cpu)
    losses = []
    for each in (model, tuned):
        network = AdaptedNetwork(denoiser=NetworkDenoiser.of(each.pipe), modules={}, text_encoders=None, start=None)
        with torch.no_grad():
            losses.append(Denoising()(batch, network).mean().item())
    row = json.loads((done.adapter / "training.jsonl").read_text())
    assert losses[0] == pytest.approx(row["loss"], rel=1e-4)
    assert losses[1] < losses[0]
    card = (done.adapter / "README.md").read_text()
    assert ("pipe.load_lora_weights(" in card) == hasattr(model.pipe, "load_lora_weights")
    assert ("PeftModel.from_pretrained(" in card) != hasattr(model.pipe, "load_lora_weights")
    further = replace(settings, objective="advantage")
    rank(pool.sets["contrast"], [1.0, -1.0])
    done = finetune(config, pool.sets["contrast"], tmp_path / "further", further, start_from=done.adapter)
    row = json.loads((done.adapter / "training.jsonl").read_text())
    assert losses[1] == pytest.approx(row["loss"], rel=1e-4)  # ‖f₀ − y*‖² = A² ‖f₀ − u‖², f₀ with the adapter


def rank(dataset, advantages):
    """Makes a set a ranked one, as a user may."""
    rows = [json.loads(line) for line in (dataset / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"advantage": advantage} for row, advantage in zip(rows, advantages, strict=True)]
    (dataset / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (dataset / SEAL).unlink()


def load_by_hand(pipe, adapter):
    """As the model card says."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(adapter), weight_name=WEIGHTS_FILE)
    else:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(adapter))


@pictures
def test_adapter(case, tmp_path):
    """A saved adapter changes what the model makes as it did before it was saved, by the way of the model card."""
    pipe = case.make()
    plain = call(pipe, case)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = denoiser_of(pipe)
    add_adapter(denoiser, FinetuneConfig(adapter="dora", rank=2, alpha=6.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in trainable({name: denoiser}).items():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    tuned = call(pipe, case)
    assert not torch.allclose(tuned, plain, atol=1e-3)
    save_adapter(tmp_path, type(pipe), {name: denoiser})
    fresh = case.make()
    load_by_hand(fresh, tmp_path)
    torch.testing.assert_close(call(fresh, case), tuned, rtol=1e-3, atol=1e-3)
    again = case.make()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(call(again, case), tuned, rtol=1e-3, atol=1e-3)


def check_pictures_and_latents(case, dtype, rounding):
    """Latents become the pipeline's own pictures, bit for bit, and its decoder's input becomes the latents again."""
    pipe = case.make().to(dtype=dtype)
    made, latents = call(pipe, case, output_type="pil"), call(pipe, case)
    handed = []

    def noted(decode, given, *args, **kwargs):
        handed.append(given)
        return decode(given, *args, **kwargs)

    with called_through(pipe.vae, noted, "decode"):
        decoded = list(decode(Model(pipe, case.call, "tiny"), latents.float()))
    for ours, its in zip(decoded, made, strict=True):
        assert np.array_equal(ours, its)
    with called_through(pipe.vae, lambda *_, **__: (torch.cat(handed).float(),), "encode"):
        encoded = encode_images(pipe, made, case.call)
    torch.testing.assert_close(encoded, latents.float(), rtol=3 * rounding, atol=rounding)
    assert encode_images(pipe, made, case.call).isfinite().all()


@pictures
def test_pictures_and_latents(case):
    check_pictures_and_latents(case, torch.float32, rounding=1e-6)


@pictures
def test_pictures_and_latents_in_half_precision(case):
    check_pictures_and_latents(case, torch.float16, rounding=1e-3)


class TestDistilled:
    """Models whose guidance is told to the network make one pass a step, unless true guidance is asked for."""

    @pytest.mark.parametrize("given", [{}, {"true_cfg_scale": 3.0}, {"negative_prompt": ["", ""]}])
    def test_flux(self, given):
        torch.manual_seed(0)
        pipe = flux(guidance_embeds=True)
        arguments = {"num_inference_steps": 3, "output_type": "latent"} | PICTURE | TEXT
        with (
            pytest.raises(GuidanceError, match="Set true_cfg_scale > 1 and a negative_prompt, which may be a blank"),
            MIProbe(pipe),
        ):
            pipe(PROMPTS, **arguments, **given)

    def test_flux_with_true_guidance(self):
        torch.manual_seed(0)
        pipe = flux(guidance_embeds=True)
        arguments = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.5} | PICTURE | TEXT
        with MIProbe(pipe) as probe:
            latents = pipe(PROMPTS, **arguments, true_cfg_scale=SCALE, negative_prompt=["", ""])[0]
        assert get_score("mi-tune")(probe.trace(latents)).isfinite().all()
        assert probe.conditioning.rows["guidance"].tolist() == [2.5, 2.5]  # the network's own, and not the scale

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.guidance == "guidance_scale"])
    def test_others(self, name):
        """Turbo and Lightning models, which are made for a scale of 1, or 0."""
        case = CASES[name]
        pipe = case.make()
        with pytest.raises(GuidanceError, match="Set guidance_scale > 1, or pick a model that is not"), MIProbe(pipe):
            call(pipe, case, guidance_scale=0.0 if case.added else 1.0)

    def test_two_denoisers(self):
        case = CASES["Wan 2.1 (video)"]
        pipe = case.make()
        pipe.register_modules(transformer_2=case.make().transformer)
        with pytest.raises(ModelError, match="denoises with two transformers in turn.*such as Wan 2.1"):
            MIProbe(pipe)


def test_unknown_families_are_refused():
    """One that makes two calls a step, but is not in the table, is not taken for one without guidance."""

    class Stranger(ChromaTransformer2DModel):
        pass

    pipe = CASES["Chroma"].make()
    pipe.transformer.__class__ = Stranger
    with pytest.raises(GuidanceError, match="does not know this kind of model; see docs/support.md"), MIProbe(pipe):
        call(pipe, CASES["Chroma"])


def test_unknown_times_are_refused():
    """One that is told t/1000, but is not in the table, is not scored at a wrong noise level."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    pipe = tiny_sd3()
    pipe.scheduler = scheduler
    with MIProbe(pipe) as probe, torch.no_grad():
        for t in scheduler.timesteps:
            told = (t / 1000).expand(2)
            pipe.transformer(torch.ones(2, 4, 8, 8), torch.ones(2, 3, 32), torch.ones(2, 16), timestep=told)
    with pytest.raises(MituneError, match="was told the time 1 at the first step, which is none of its scheduler's"):
        probe.trace()
