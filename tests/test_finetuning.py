"""The loop on tiny real pipelines: it learns, resumes to the same bits, and outlives NaN and lack of memory."""

import json
import shutil
import signal

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import mitune.finetuning.run
from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.opening.components import Components
from mitune.errors import MituneError, ModelError
from mitune.finetuning.adapter import WEIGHTS_FILE
from mitune.finetuning.objectives.denoising import Denoising
from mitune.finetuning.run import finetune
from mitune.run.sealed import unpack
from mitune.run.stopping import Stopped, signals_raised
from tests.sets import images_of, write_set
from tests.tiny import saved_pipeline


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Saved tiny models and their sets, by kind."""
    folder = tmp_path_factory.mktemp("world")
    kinds = ("sd", "sdxl", "sd3")
    plain = {kind: (saved_pipeline(kind, folder / kind), write_set(kind, folder / f"{kind}-set")) for kind in kinds}
    ranked = write_set("sd", folder / "ranked", advantages=[1.0, 0.5, 0.0, 0.0, -1.0, -0.5])
    return {**plain, "ranked": (plain["sd"][0], ranked)}


def config_of(**changes):
    settings = {"adapter": "lora", "rank": 2, "alpha": 4.0, "batch_size": 4, "iterations": 3, "learning_rate": 1e-2}
    return FinetuneConfig(**(settings | changes))


def weights_of(folder):
    return load_file(folder / WEIGHTS_FILE)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def history_of(folder):
    """Of the rows, all but the seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(folder)]


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "with text encoders"])
@pytest.mark.parametrize(("kind", "adapter"), [("sd", "dora"), ("sdxl", "lora"), ("sd3", "dora")])
def test_loaded_adapter_makes_the_images_of_the_tuned_model(kind, adapter, text_encoder, world, tmp_path, monkeypatch):
    model, dataset = world[kind]
    kept = {}
    save = mitune.finetuning.run.save_adapter

    def watched(folder, cls, modules, notes):
        kept.update(modules)
        save(folder, cls, modules, notes)

    monkeypatch.setattr(mitune.finetuning.run, "save_adapter", watched)
    config = config_of(adapter=adapter, text_encoder=text_encoder)
    result = finetune(model, dataset, tmp_path / "adapter", config)
    assert (result.adapter, result.iterations, result.skipped) == (tmp_path / "adapter", 3, 0)
    assert len(kept) == (1 if not text_encoder else 2 if kind == "sd" else 3)

    base = images_of(DiffusionPipeline.from_pretrained(model.name), kind)
    tuned = DiffusionPipeline.from_pretrained(model.name)
    for name, component in kept.items():
        setattr(tuned, name, component)
    loaded = DiffusionPipeline.from_pretrained(model.name)
    loaded.load_lora_weights(str(result.adapter))
    assert (images_of(loaded, kind) - base).abs().max() > 1e-4
    assert torch.equal(images_of(loaded, kind), images_of(tuned, kind))
    assert {name.split(".")[0] for name in weights_of(result.adapter)} == set(kept)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_neither_vae_nor_text_encoder_is_needed(kind, world, tmp_path):
    model, dataset = world[kind]
    shutil.copytree(model.name, tmp_path / "model")
    for part in (tmp_path / "model").iterdir():
        if part.is_dir() and part.name.startswith(("vae", "text_encoder", "tokenizer")):
            shutil.rmtree(part)
    finetune(ModelConfig(name=str(tmp_path / "model"), device="cpu"), dataset, tmp_path / "adapter", config_of())
    finetune(model, dataset, tmp_path / "whole", config_of())
    assert largest_difference(weights_of(tmp_path / "adapter"), weights_of(tmp_path / "whole")) == 0


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_training_lowers_the_loss(kind, world, tmp_path):
    model, dataset = world[kind]
    config = config_of(iterations=60, batch_size=16, rank=8, alpha=16.0, timesteps=(0.7, 1.0))
    finetune(model, dataset, tmp_path, config)
    losses = torch.tensor([row["loss"] for row in rows_of(tmp_path)])
    first, last = losses[:10], losses[-10:]
    standard_error = ((first.var() + last.var()) / 10).sqrt()
    assert first.mean() - last.mean() > 4 * standard_error


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{"adapter": "dora"}, {"ema": 0.9}, {"text_encoder": True}, {"warmup": 4}])
def test_stopped_run_ends_like_one_that_was_not(changes, world, tmp_path):
    check_stopped_run(*world["sd"], config_of(iterations=6, checkpoint_every=2, **changes), tmp_path)


@pytest.mark.parametrize("later", [False, True], ids=["first round", "later round, DoRA, bf16"])
def test_stopped_run_with_a_reference_ends_like_one_that_was_not(later, world, tmp_path):
    """Of text encoders, too, one image at a time; the reference is the base, or the adapter of the round before."""
    settings = {"objective": "advantage", "text_encoder": True, "batch_size": 2, "micro_batch_size": 1}
    settings |= {"adapter": "dora", "precision": "bf16"} if later else {}
    before = finetune(*world["ranked"], tmp_path / "before", config_of(**settings)).adapter if later else None
    check_stopped_run(*world["ranked"], config_of(iterations=6, checkpoint_every=2, **settings), tmp_path, before)


def check_stopped_run(model, dataset, config, tmp_path, start_from=None):

    def stop(done, _total, _loss):
        if done == 5:  # one iteration past the checkpoint
            raise Killed

    with pytest.raises(Killed):
        finetune(model, dataset, tmp_path / "stopped", config, start_from=start_from, progress=stop)
    assert not (tmp_path / "stopped" / WEIGHTS_FILE).exists()
    with (tmp_path / "stopped" / "training.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 5, "lo')  # the kill fell into a row
    torch.manual_seed(123)
    seen = []
    for folder in ("stopped", "whole"):
        watch = (lambda *arguments: seen.append(arguments[:2])) if folder == "stopped" else None
        finetune(model, dataset, tmp_path / folder, config, start_from=start_from, progress=watch)
    assert seen == [(5, 6), (6, 6)]
    assert largest_difference(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "whole")) == 0
    assert history_of(tmp_path / "stopped") == history_of(tmp_path / "whole")
    assert [row["iteration"] for row in rows_of(tmp_path / "whole")] == [0, 1, 2, 3, 4, 5]
    state = "checkpoint/state.safetensors"
    assert largest_difference(load_file(tmp_path / "stopped" / state), load_file(tmp_path / "whole" / state)) == 0


def test_finished_run_returns_at_once(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    first = finetune(model, dataset, tmp_path, config_of())
    monkeypatch.setattr(Components, "denoiser", lambda _: pytest.fail("the denoiser was opened"))
    assert finetune(model, dataset, tmp_path, config_of(checkpoint_every=7)) == first


def test_folder_of_other_settings_is_refused(world, tmp_path):
    model, dataset = world["sd"]
    finetune(model, dataset, tmp_path, config_of())
    with pytest.raises(MituneError, match="rank: 2 there, 3 now"):
        finetune(model, dataset, tmp_path, config_of(rank=3))
    with pytest.raises(MituneError, match="set: .* there"):
        finetune(model, world["sdxl"][1], tmp_path, config_of())


def _cut(content):
    return content[: len(content) // 2]


def _flip(content):
    middle = len(content) * 2 // 3  # among the tensors, where safetensors itself sees nothing
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def _reheaded(content):
    return content[:8] + b"?" + content[9:]


@pytest.mark.parametrize("change", [_cut, _flip, _reheaded, lambda _: b"", lambda _: b"\0" * 64])
@pytest.mark.parametrize("name", [WEIGHTS_FILE, "checkpoint/state.safetensors", "training.jsonl"])
def test_damaged_file_is_made_again(name, change, world, tmp_path, caplog):
    model, dataset = world["sd"]
    first = finetune(model, dataset, tmp_path, config_of(ema=0.9))
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    if name != WEIGHTS_FILE:
        (tmp_path / WEIGHTS_FILE).unlink()
    again = finetune(model, dataset, tmp_path, config_of(ema=0.9))
    assert (again.iterations, again.skipped) == (first.iterations, first.skipped)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == content
    if name == "training.jsonl":
        assert "rows; the adapter does not depend on them" in caplog.text
    else:
        assert "is damaged; it is set aside" in caplog.text
        assert (tmp_path / f"{name}.damaged").exists()


def test_history_of_a_finished_run_may_be_lost(world, tmp_path):
    model, dataset = world["sd"]
    first = finetune(model, dataset, tmp_path, config_of())
    (tmp_path / "training.jsonl").write_bytes(b'{"iteration": 0, "seconds": 0.5}\n{"iteration": 1, "sec\xff')
    again = finetune(model, dataset, tmp_path, config_of())
    assert (again.iterations, again.skipped, again.seconds) == (first.iterations, first.skipped, 0.5)


@pytest.mark.parametrize("every", [1, 50])
def test_signal_leaves_a_checkpoint_of_the_last_whole_iteration(every, world, tmp_path, monkeypatch):
    """A signal in the backward pass of the fourth iteration, long before the first checkpoint is due."""
    model, dataset = world["sd"]
    config = config_of(iterations=5, adapter="dora", ema=0.9, checkpoint_every=every)
    errors, calls = Denoising.__call__, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return errors(*arguments)

    monkeypatch.setattr(Denoising, "__call__", interrupted)
    with pytest.raises(Stopped), signals_raised():
        finetune(model, dataset, tmp_path / "stopped", config)
    state, _ = unpack((tmp_path / "stopped" / "checkpoint" / "state.safetensors").read_bytes())
    assert any(tensor.item() == 3 for name, tensor in state.items() if name.startswith("step/"))
    seen = []
    finetune(model, dataset, tmp_path / "stopped", config, progress=lambda *arguments: seen.append(arguments[0]))
    finetune(model, dataset, tmp_path / "whole", config)
    assert seen == [4, 5]
    for name in (WEIGHTS_FILE, "checkpoint/state.safetensors", "README.md"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert history_of(tmp_path / "stopped") == history_of(tmp_path / "whole")


def test_signal_in_a_step_waits_for_its_end(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self, closure=None):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, dataset, tmp_path / "stopped", config_of())
    finetune(model, dataset, tmp_path / "stopped", config_of())
    finetune(model, dataset, tmp_path / "whole", config_of())
    assert (tmp_path / "stopped" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert len(calls) == 3 + 3


def test_loss_that_is_nan_skips_its_iteration(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    errors, calls, seen = Denoising.__call__, [], []

    def sometimes_nan(*arguments):
        calls.append(1)
        return errors(*arguments) * (torch.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(Denoising, "__call__", sometimes_nan)
    config = config_of(iterations=4, ema=0.5, checkpoint_every=1)
    weights = {}

    def keep(done, _total, loss):
        seen.append(loss)
        weights[done] = load_file(tmp_path / "checkpoint" / "state.safetensors")

    result = finetune(model, dataset, tmp_path, config, progress=keep)
    assert (result.iterations, result.skipped) == (4, 1)
    assert [row["skipped"] for row in rows_of(tmp_path)] == [False, True, False, False]
    assert rows_of(tmp_path)[1]["loss"] is None
    assert [loss == loss for loss in seen] == [True, False, True, True]
    assert largest_difference(weights[2], weights[1]) == 0  # weights, moments and average alike
    assert largest_difference(weights[3], weights[2]) > 0
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path).values())
    assert "1 of 4" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("factor", [float("nan"), 1e12])
@pytest.mark.parametrize("iterations", [3, 40])
def test_run_without_a_sensible_loss_fails(factor, iterations, world, tmp_path, monkeypatch):
    """Soon, rather than at its end, and again when it is taken up."""
    model, dataset = world["sd"]
    errors, seen = Denoising.__call__, []
    monkeypatch.setattr(Denoising, "__call__", lambda *arguments: errors(*arguments) * factor)
    for _ in range(2):
        with pytest.raises(
            MituneError, match=r"diverged, and no adapter is written: .* finetune\.learning_rate.*dtype"
        ):
            finetune(model, dataset, tmp_path, config_of(iterations=iterations), progress=lambda *a: seen.append(a[0]))
        assert max(seen) <= 25
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_run_that_changes_no_weight_fails(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    for _ in range(2):
        with pytest.raises(MituneError, match="learned nothing, and no adapter is written"):
            finetune(model, dataset, tmp_path, config_of())
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_weights_that_are_not_finite_are_never_written(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]

    def overflowing(self, closure=None):  # noqa: ARG001
        for parameter in self.param_groups[0]["params"]:
            parameter.data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(MituneError, match=r"not written: its weights are not finite .*learning_rate"):
        finetune(model, dataset, tmp_path, config_of(iterations=1))
    assert not (tmp_path / WEIGHTS_FILE).exists()


def out_of_memory_above(limit, monkeypatch):
    errors, sizes = Denoising.__call__, []

    def limited(self, batch, network):
        sizes.append(len(batch.latents))
        if len(batch.latents) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return errors(self, batch, network)

    monkeypatch.setattr(Denoising, "__call__", limited)
    return sizes


def test_out_of_memory_halves_the_micro_batch(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    finetune(model, dataset, tmp_path / "roomy", config_of(batch_size=6))
    sizes = out_of_memory_above(2, monkeypatch)
    finetune(model, dataset, tmp_path / "narrow", config_of(batch_size=6))
    assert sizes == [6, 3, *[2, 2, 2] * 3]
    # Adam turns rounding of a gradient near zero into a step of up to the learning rate; the losses show no more.
    for narrow, roomy in zip(rows_of(tmp_path / "narrow"), rows_of(tmp_path / "roomy"), strict=True):
        assert narrow["loss"] == pytest.approx(roomy["loss"], rel=1e-4)
        assert narrow["gradient_norm"] == pytest.approx(roomy["gradient_norm"], rel=1e-3)


def test_out_of_memory_with_one_image_says_what_to_do(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(MituneError, match="Out of memory with one image at a time"):
        finetune(model, dataset, tmp_path, config_of())


def test_other_errors_are_not_taken_for_lack_of_memory(world, tmp_path, monkeypatch):
    model, dataset = world["sd"]

    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Denoising, "__call__", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        finetune(model, dataset, tmp_path, config_of())


@pytest.fixture
def steps(monkeypatch):
    """Gradient norm and learning rate that the optimizer gets at each step."""
    seen, step = [], torch.optim.AdamW.step

    def watched(self, closure=None):
        group = self.param_groups[0]
        norms = [parameter.grad.norm() for parameter in group["params"] if parameter.grad is not None]
        seen.append((torch.stack(norms).norm().item(), group["lr"]))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_clipping_clips(world, tmp_path, steps):
    model, dataset = world["sd"]
    finetune(model, dataset, tmp_path, config_of(clip=1e-3))
    assert [norm for norm, _ in steps] == pytest.approx([1e-3] * 3, rel=1e-2)
    assert all(row["gradient_norm"] > 1e-2 for row in rows_of(tmp_path))  # the log has the norm before


def test_warmup_is_linear_then_constant(world, tmp_path, steps):
    model, dataset = world["sd"]
    finetune(model, dataset, tmp_path, config_of(iterations=5, warmup=4))
    assert [rate for _, rate in steps] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


@pytest.mark.parametrize(
    ("kind", "changes", "rounding"),
    [
        ("sd3", {}, 1e-5),
        ("ranked", {"objective": "advantage", "text_encoder": True}, 1e-5),
        ("ranked", {"objective": "advantage", "text_encoder": True, "precision": "bf16"}, 1e-3),
    ],
)
def test_micro_batches_add_up_to_the_batch(kind, changes, rounding, world, tmp_path):
    model, dataset = world[kind]
    for size in (None, 1, 2):
        finetune(model, dataset, tmp_path / str(size), config_of(iterations=1, micro_batch_size=size, **changes))
    whole = rows_of(tmp_path / "None")[0]
    for size in ("1", "2"):
        row = rows_of(tmp_path / size)[0]
        assert row["loss"] == pytest.approx(whole["loss"], rel=rounding)
        assert row["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=100 * rounding)


def test_image_of_weight_zero_does_not_count(world, tmp_path):
    model, _ = world["sd"]
    weights = [1.0, 1.0, 0.0, 2.0, 1.0, 1.0]
    first, second = (write_set("sd", tmp_path / name, weights=weights) for name in ("first", "second"))
    latents = load_file(second / "latents.safetensors")["latents"]
    latents[2] += 5
    save_file({"latents": latents}, second / "latents.safetensors")
    for dataset in (first, second):
        finetune(model, dataset, tmp_path / f"{dataset.name}-adapter", config_of(batch_size=16, iterations=2))
    assert history_of(tmp_path / "first-adapter") == history_of(tmp_path / "second-adapter")
    plain = write_set("sd", tmp_path / "plain")
    finetune(model, plain, tmp_path / "plain-adapter", config_of(batch_size=16, iterations=2))
    assert history_of(tmp_path / "first-adapter") != history_of(tmp_path / "plain-adapter")


def test_a_round_goes_on_from_the_last_ones_adapter(world, tmp_path):
    model, dataset = world["sd"]
    finetune(model, dataset, tmp_path / "first", config_of(adapter="dora"))
    slow = config_of(adapter="dora", learning_rate=1e-5, iterations=1, seed=5)
    finetune(model, dataset, tmp_path / "second", slow, start_from=tmp_path / "first")
    # Adam's first step is the learning rate at most, and weight decay far less.
    assert 0 < largest_difference(weights_of(tmp_path / "first"), weights_of(tmp_path / "second")) < 1.1e-5


def test_moving_average_is_what_is_saved(world, tmp_path):
    """Decay 0.1 = (1 + 0) / (10 + 0) at the first iteration, 2/11 at the second: each below the limit of 0.9."""
    model, dataset = world["sd"]
    kept = []

    def keep(*_):
        state = load_file(tmp_path / "checkpoint" / "state.safetensors")
        kept.append({n.removeprefix("weight/"): v for n, v in state.items() if n.startswith("weight/")})

    finetune(model, dataset, tmp_path, config_of(iterations=2, ema=0.9, checkpoint_every=1), progress=keep)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B"
    # lora_B starts at zero
    first, second = (weights[f"{name}.default.weight"] for weights in kept)
    expected = 2 / 11 * (0.9 * first) + 9 / 11 * second
    assert torch.allclose(weights_of(tmp_path)[f"{name}.weight"], expected, atol=1e-7)


def test_precision_may_change_from_call_to_call(world, tmp_path):
    model, dataset = world["sd"]
    for precision in ("no", "bf16", "no"):
        finetune(
            model, dataset, tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}", config_of(precision=precision)
        )
    exact, rounded, again = (history_of(tmp_path / name)[0]["loss"] for name in ("no-0", "bf16-1", "no-2"))
    assert exact == again != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_base_model_may_be_bfloat16(adapter, world, tmp_path):
    model, dataset = world["sd3"]
    low = ModelConfig(name=model.name, device="cpu", dtype="bfloat16", call=model.call)
    finetune(low, dataset, tmp_path / "low", config_of(adapter=adapter))
    finetune(model, dataset, tmp_path / "high", config_of(adapter=adapter))
    assert {tensor.dtype for tensor in weights_of(tmp_path / "low").values()} == {torch.float32}
    assert rows_of(tmp_path / "low")[0]["loss"] == pytest.approx(rows_of(tmp_path / "high")[0]["loss"], rel=0.05)


def test_half_precision_on_a_cpu_is_refused(world, tmp_path):
    model, dataset = world["sd"]
    with pytest.raises(MituneError, match="fp16 needs a GPU"):
        finetune(model, dataset, tmp_path, config_of(precision="fp16"))


def test_text_encoders_must_give_what_the_set_holds(world, tmp_path):
    model, dataset = world["sd3"]
    other = ModelConfig(name=model.name, device="cpu", call={"max_sequence_length": 2})
    with pytest.raises(MituneError, match="set model.call as it was"):
        finetune(other, dataset, tmp_path, config_of(text_encoder=True))


def test_model_without_lora_loader_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(ModelError, match="is a DDPMPipeline, which takes no prompt"):
        Components.of(ModelConfig(name=str(tmp_path)))
    with pytest.raises(ModelError, match="There is no model"):
        Components.of(ModelConfig(name=str(tmp_path / "nowhere")))
