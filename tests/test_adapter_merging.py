"""Sums of adapters: what the merged one does to a model is the weighted sum of what each of them does."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.opening.adapter_file import PEFT_WEIGHTS, WEIGHTS_FILE, load_adapter
from mitune.errors import MituneError
from mitune.finetuning.adapter import SETTINGS, add_adapter, save_adapter, trainable
from mitune.finetuning.card import write_card
from mitune.finetuning.merging import merge_adapters
from mitune.finetuning.run import finetune
from mitune.finetuning.weight_change import WeightChange, weighted_sum
from mitune.run.sealed import pack, unpack
from tests.sets import images_of, write_set
from tests.test_cli_errors import invoke
from tests.tiny import BUILDERS, saved_pipeline, tiny_sd, tiny_sd3

PARTS = ("unet", "transformer", "text_encoder")


def with_adapter(pipe, components, *, seed, **settings):
    """Gives a pipeline an adapter of random weights, as if it were trained; the modules that have it."""
    modules = {name: getattr(pipe, name) for name in components}
    for module in modules.values():
        add_adapter(module, FinetuneConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(modules).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return modules


class Place:
    """Saved models, "sd" and "sd3", and three LoRAs and three DoRAs of each, which differ in rank and alpha; the third
    adapts the text encoder, too."""

    def __init__(self, folder):
        self.folder, self.models = folder, {kind: saved_pipeline(kind, folder / kind) for kind in ("sd", "sd3")}
        self.weights = functools.cache(self.weights)

    def adapter(self, kind, name):
        folder, (adapter, number) = self.folder / f"{kind}-{name}", name.split("-")
        if not folder.exists():
            rank, alpha, more = [(2, 3.0, []), (3, 2.0, []), (1, 1.5, ["text_encoder"])][int(number)]
            pipe, settings = BUILDERS[kind](), {"adapter": adapter, "rank": rank, "alpha": alpha}
            components = ["unet" if kind == "sd" else "transformer", *more]
            save_adapter(folder, type(pipe), with_adapter(pipe, components, seed=int(number), **settings))
            config = FinetuneConfig(**settings)
            write_card(folder, self.models[kind], config, prompts=["a"], selection="random", skipped=0)
        return folder

    def weights(self, kind, adapter):
        """The parameters of a pipeline with an adapter merged into them, by diffusers' own means, in float64."""
        pipe = BUILDERS[kind]()
        if adapter is not None:
            pipe.load_lora_weights(str(adapter))
            pipe.fuse_lora(components=[name for name in PARTS if hasattr(pipe, name)])
            pipe.unload_lora_weights()
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        return {
            f"{n}.{key}": value.detach().double() for n, part in parts.items() for key, value in part.named_parameters()
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("merging"))


MIXTURES = {
    "LoRA, of all signs, one with a text encoder": ("sd", {"lora-0": 0.5, "lora-1": 0.25, "lora-2": -1.5}),
    "LoRA of a transformer": ("sd3", {"lora-0": 0.7, "lora-1": 0.3}),
    "LoRA, one alone": ("sd", {"lora-1": -0.5}),
    "DoRA": ("sd", {"dora-0": 0.7, "dora-1": 0.3}),
    "DoRA, away from one": ("sd3", {"dora-0": 1.2, "dora-1": -0.7}),
    "DoRA, with a text encoder": ("sd", {"dora-0": 0.5, "dora-2": -1.5}),
    "DoRA and LoRA": ("sd", {"dora-0": 0.5, "lora-1": -0.5, "lora-2": 0.8}),
}


@pytest.mark.parametrize(("kind", "mixture"), MIXTURES.values(), ids=MIXTURES)
def test_change_of_the_weights_is_the_weighted_sum(kind, mixture, place, tmp_path):
    """W' = W + Σ w_i (W'_i − W), of every parameter of the pipeline."""
    summands = [(place.adapter(kind, name), weight) for name, weight in mixture.items()]
    result = merge_adapters(summands, tmp_path / "merged", model=place.models[kind])
    ranks = {"0": 2, "1": 3, "2": 1}
    assert (result.rank, result.kept) == (sum(ranks[name[-1]] for name in mixture), 1.0)
    base, found = place.weights(kind, None), place.weights(kind, tmp_path / "merged")
    for name, weight in base.items():
        expected = weight + sum(w * (place.weights(kind, adapter)[name] - weight) for adapter, w in summands)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=2e-6)
    assert max((found[name] - base[name]).abs().max().item() for name in base) > 0.01


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_images_are_those_of_adapters_that_are_active_together(place, tmp_path):
    """diffusers' own sum, which it takes at each call of a layer."""
    summands = [(place.adapter("sd", name), weight) for name, weight in {"lora-0": 0.5, "lora-2": -1.5}.items()]
    merge_adapters(summands, tmp_path / "merged")
    together, merged = tiny_sd(), tiny_sd()
    for adapter, _ in summands:
        together.load_lora_weights(str(adapter), adapter_name=adapter.name)
    together.set_adapters([adapter.name for adapter, _ in summands], [weight for _, weight in summands])
    merged.load_lora_weights(str(tmp_path / "merged"))
    assert (images_of(merged, "sd") - images_of(tiny_sd(), "sd")).abs().max() > 1e-3
    torch.testing.assert_close(images_of(merged, "sd"), images_of(together, "sd"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_ends_are_the_adapters_themselves(adapter, place, tmp_path):
    """λ = 1 and λ = 0, bit for bit and without the model; and one adapter with weight 1."""
    one, other = (place.adapter("sd", f"{adapter}-{number}") for number in (0, 1))
    for name, summands in {"1": [(one, 1), (other, 0)], "0": [(one, 0), (other, 1)], "one": [(one, 1)]}.items():
        result = merge_adapters(summands, tmp_path / name)
        assert result.is_copy
        whole = other if name == "0" else one
        assert (tmp_path / name / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    near = merge_adapters([(one, 1 - 1e-9), (other, 1e-9)], tmp_path / "near", model=place.models["sd"])
    assert near.rank == 5
    found, expected = place.weights("sd", near.adapter), place.weights("sd", one)
    assert max((found[name] - expected[name]).abs().max().item() for name in found) < 1e-6


def change_of(rank, *, dora, seed):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 12, generator=generator), torch.randn(9, rank, generator=generator)
    if not dora:
        return WeightChange.of_lora(down, up, 0.3)
    weight, magnitude = torch.randn(9, 12, generator=generator), torch.rand(9, generator=generator) + 0.5
    return WeightChange.of_dora(down, up, 0.3, magnitude, weight)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_truncation_leaves_out_the_least_singular_values(rank, dora):
    changes = [(0.8, change_of(3, dora=dora, seed=1)), (-0.4, change_of(5, dora=False, seed=2))]
    change = weighted_sum(changes)
    matrix = change.up @ change.down
    values = torch.linalg.svdvals(matrix)
    nearest, lost = change.truncated(rank)
    assert nearest.rank == rank
    tail = values[rank:].square().sum().item()
    assert lost == pytest.approx(tail, rel=1e-9)
    assert (matrix - nearest.up @ nearest.down).square().sum().item() == pytest.approx(tail, rel=1e-9)
    whole, lost = change.truncated(8)
    assert (whole, lost) == (change, 0)


@pytest.mark.parametrize("names", [["lora-0", "lora-1"], ["dora-0", "lora-1"]])
def test_share_that_is_kept_is_that_of_the_weights(names, place, tmp_path):
    """1 − ‖W'_exact − W'_truncated‖² / ‖W'_exact − W‖² over all weights."""
    summands = [(place.adapter("sd", name), weight) for name, weight in zip(names, (0.8, -0.6), strict=True)]
    model = place.models["sd"]
    for name, rank in (("exact", None), ("small", 2), ("also exact", 9)):
        result = merge_adapters(summands, tmp_path / name, rank=rank, model=model)
        assert (result.rank, result.full_rank) == (min(rank or 5, 5), 5)
        base, exact = place.weights("sd", None), place.weights("sd", tmp_path / "exact")
        found = place.weights("sd", result.adapter)
        error = sum((found[name] - exact[name]).square().sum().item() for name in base)
        norm = sum((exact[name] - base[name]).square().sum().item() for name in base)
        assert result.kept == pytest.approx(1 - error / norm, abs=1e-6)
        assert (result.kept < 0.99) == (rank == 2)
    assert {
        tensor.shape[0] for key, tensor in load_file(tmp_path / "small" / WEIGHTS_FILE).items() if "lora_A" in key
    } == {2}
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "rank and alpha are 2 instead of 5, which keeps" in card


def test_row_that_vanishes_is_no_dora():
    change = WeightChange(torch.ones(3, 1).double(), torch.ones(1, 4).double(), torch.tensor([1.0, 0.0, -2.0]).double())
    assert change.dora_factors(torch.ones(3, 4)) is None


@pytest.mark.parametrize(
    ("header", "scaling"),
    [
        ({}, 1.0),  # alpha is the rank, as diffusers has it
        ({"unet.lora_alpha": 6.0}, 3.0),
        ({"unet.lora_alpha": 6.0, "unet.use_rslora": True}, 6 / 2**0.5),
        ({"unet.lora_alpha": 6.0, "unet.alpha_pattern": {"ff.net.0.proj": 4.0, "attn1.to_q": 9.0}}, 4.5),
    ],
)
def test_alpha_of_other_programs(header, scaling, place, tmp_path):
    """A layer's own alpha comes first, and there may be none."""
    tensors = load_file(place.adapter("sd", "lora-0") / WEIGHTS_FILE)
    (tmp_path / "theirs").mkdir()
    content = pack(tensors, {SETTINGS: json.dumps(header)} if header else {})
    (tmp_path / "theirs" / WEIGHTS_FILE).write_bytes(content)
    merge_adapters([(tmp_path / "theirs", 0.5)], tmp_path / "merged", model=place.models["sd"])
    merged, notes = unpack((tmp_path / "merged" / WEIGHTS_FILE).read_bytes())
    assert json.loads(notes[SETTINGS])["unet.lora_alpha"] == 2
    (layer,) = {key for key in tensors if "mid_block" in key and "attn1.to_q.lora_B" in key}
    torch.testing.assert_close(merged[layer], 0.5 * scaling * tensors[layer])


def test_model_without_a_loader_in_diffusers(tmp_path):
    """PixArt's: PEFT reads the folder, too."""
    for seed in (0, 1):
        modules = with_adapter(tiny_sd3(), ["transformer"], seed=seed, adapter="lora", rank=2, alpha=3.0)
        save_adapter(tmp_path / str(seed), PixArtSigmaPipeline, modules)
    model = ModelConfig(name="nobody/model")  # for the card alone
    merge_adapters([(tmp_path / "0", 1.5), (tmp_path / "1", -0.5)], tmp_path / "merged", model=model)
    merge_adapters([(tmp_path / "0", 1)], tmp_path / "copy", model=model)
    assert (tmp_path / "copy" / PEFT_WEIGHTS).read_bytes() == (tmp_path / "0" / PEFT_WEIGHTS).read_bytes()
    by_peft, by_diffusers = tiny_sd3(), tiny_sd3()
    PeftModel.from_pretrained(by_peft.transformer, str(tmp_path / "merged"))
    by_diffusers.load_lora_weights(str(tmp_path / "merged"))
    assert torch.equal(images_of(by_peft, "sd3"), images_of(by_diffusers, "sd3"))
    assert "PeftModel.from_pretrained" in (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [["lora-0", "lora-2"], ["dora-0", "dora-1"]])
def test_training_goes_on_from_a_merged_adapter(names, place, tmp_path):
    """The text encoder, which one adapter has alone, is filled up to the rank of all."""
    model, dataset = place.models["sd"], write_set("sd", tmp_path / "set")
    summands = [(place.adapter("sd", name), 0.5) for name in names]
    result = merge_adapters(summands, tmp_path / "merged", model=model)
    settings = {"adapter": names[0][:4], "rank": result.rank, "alpha": result.rank, "text_encoder": "lora-2" in names}
    config = FinetuneConfig(**settings, iterations=1, batch_size=2, learning_rate=1e-6)
    trained = finetune(model, dataset, tmp_path / "trained", config, start_from=result.adapter)
    before, after = place.weights("sd", result.adapter), place.weights("sd", trained.adapter)
    assert 0 < max((after[name] - before[name]).abs().max().item() for name in before) < 1e-4


def test_command_merges_and_others_take_its_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.adapter("sd", "dora-0"), "runs/color")
    shutil.copytree(place.adapter("sd", "lora-1"), "runs/far:1")
    model = ["-m", place.folder / "sd"]
    line = ["merge", "runs/color", "runs/far:1:-0.5", "-o", "merged", *model]
    for _ in range(2):  # the same command again is welcome
        status, shown = invoke(*line)
        assert status == 0, shown
        assert "Its rank and alpha are 5; nothing is approximated." in shown
    summands = [(Path("runs/color"), 1), (Path("runs/far:1"), -0.5)]
    merge_adapters(summands, tmp_path / "called", model=place.models["sd"])
    assert (tmp_path / "called" / WEIGHTS_FILE).read_bytes() == (tmp_path / "merged" / WEIGHTS_FILE).read_bytes()
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    for part in ('base_model: "sd"', "A DoRA adapter", "| runs/color | 1 |", "| runs/far:1 | -0.5 |", "alpha are 5"):
        assert part in card
    options = ["-n", 1, "--set", "model.steps=3", "--adapter", "merged", "-o", "images"]
    status, shown = invoke("generate", "a red ball", *model, *options)
    assert (status, (tmp_path / "images" / "001-001.png").is_file()) == (0, True), shown
    status, shown = invoke(*line, "--rank", 4)
    assert (status, "merged holds a merged adapter of other settings (rank: null there, 4 now)" in shown) == (2, True)


def changed(place, tmp_path, **changes):
    """A copy of a LoRA with other tensors, card or record of its model."""
    folder = shutil.copytree(place.adapter("sd", "lora-0"), tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
    if "tensors" in changes:
        save_file(changes["tensors"](load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)
    if "model" in changes:
        (folder / "README.md").write_text(f"---\nbase_model: {changes['model']}\n---\n")
    if "parts" in changes:
        (folder / "settings.json").write_text(json.dumps({"model": {"parts": changes["parts"]}}))
    return folder


@pytest.mark.parametrize(
    ("one", "other", "sentence"),
    [
        (
            {"model": "a/model"},
            {"model": "a/third"},
            r"for different models \(a/model and a/third\); merge adapters of one",
        ),
        ({"parts": {"unet": "1"}}, {"parts": {"unet": "2"}}, "the weights of their unet differ"),
        (
            {"tensors": lambda t: {k.replace("unet", "transformer"): v for k, v in t.items()}},
            {},
            "transformer and unet",
        ),
        (
            {"tensors": lambda t: {k: torch.ones(2, 99) if "lora_A" in k else v for k, v in t.items()}},
            {},
            r"is \(\d+, 99\) in",
        ),
    ],
)
def test_adapters_of_different_models(one, other, sentence, place, tmp_path):
    folders = [changed(place, tmp_path, **changes) for changes in (one, other)]
    with pytest.raises(MituneError, match=sentence):
        merge_adapters([(folder, 0.5) for folder in folders], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model": "a/model"}, {"model": "b/model"}),  # a copy on the hub
        ({"model": "a/model", "parts": {"unet": "1"}}, {"model": "folder", "parts": {"unet": "1", "vae": "2"}}),
        ({"model": "[a, b]"}, {"parts": ["none"]}),
    ],
)
def test_adapters_of_the_same_model_by_another_name(one, other, place, tmp_path):
    folders = [changed(place, tmp_path, **changes) for changes in (one, other)]
    merge_adapters([(folder, 0.5) for folder in folders], tmp_path / "merged")
    load_adapter(tiny_sd(), tmp_path / "merged")


def _with(key, tensor):
    return lambda tensors: tensors | {key: tensor}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (_with("lora_unet_x.alpha", torch.tensor(2.0)), "holds lora_unet_x.alpha, of shape .*convert the adapter"),
        (lambda t: {k: v[..., None, None] for k, v in t.items()}, "none of a LoRA's or DoRA's of linear layers"),
        (_with("unet.x.lora_magnitude_vector", torch.ones(3)), "The factors of unet.x .* do not fit each other"),
        (lambda t: {k: v[:1] if "lora_A" in k else v for k, v in t.items()}, "do not fit each other"),
        (lambda t: {k: 3e38 * v for k, v in t.items()}, "not finite"),
    ],
)
def test_weights_that_cannot_be_merged(tensors, sentence, place, tmp_path):
    with pytest.raises(MituneError, match=sentence):
        merge_adapters([(changed(place, tmp_path, tensors=tensors), 4.0)], tmp_path / "merged")
    assert not (tmp_path / "merged" / WEIGHTS_FILE).exists()


def test_dora_takes_the_model_that_it_is_for(place, tmp_path):
    """By the card alone only a model that can be had by its name."""
    summands = [(place.adapter("sd", "dora-0"), 0.5), (place.adapter("sd", "lora-1"), 0.5)]
    with pytest.raises(MituneError, match="depends on the weights of their model, sd; name its place with --model"):
        merge_adapters(summands, tmp_path / "merged")
    with pytest.raises(MituneError, match=r"is not for .*sd3, with whose weights it would be merged"):
        merge_adapters(summands, tmp_path / "merged", model=place.models["sd3"])
    folder = shutil.copytree(place.adapter("sd", "dora-0"), tmp_path / "other")
    (folder / "settings.json").write_text(json.dumps({"model": {"parts": {"unet": "of another one"}}}))
    with pytest.raises(MituneError, match=r"other.* is not for .*sd, with whose"):
        merge_adapters([(folder, 0.5)], tmp_path / "merged", model=place.models["sd"])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("one:nan", "The weight of one, nan, must be finite"),
        ("one:inf", "The weight of one, inf, must be finite"),
        ("one:0", "Every weight is 0"),
        ("one:half", "There is no adapter one:half; give a folder or .safetensors file, and its weight as a number"),
        ("far:1", "There is no adapter far; for the one called far:1, write far:1:1."),
        ("one none", "There is no adapter none"),
        ("empty", "empty holds no adapter"),
        ("one -o full", "full is not empty and holds no merged adapter; choose another folder"),
        ("one -o one", "one is not empty and holds no merged adapter"),
        ("one -o full/notes.txt", "full/notes.txt"),
        ("bare", "None of these adapters has a card that names its model; name it with --model."),
        ("one --rank 0", "--rank"),
        ("", "ADAPTER"),
    ],
)
def test_bad_line_is_one_sentence(line, sentence, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.adapter("sd", "lora-0"), "one")
    shutil.copytree("one", "far:1")
    for folder in ("empty", "full", "bare"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copy(f"one/{WEIGHTS_FILE}", "bare")
    status, shown = invoke("merge", *line.split())
    assert (status, sentence in shown) == (2, True), shown
