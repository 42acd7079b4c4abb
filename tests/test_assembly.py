"""Sets are whole or made again, and nothing is removed but what mitune made."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mitune.config.schema import PoolConfig
from mitune.denoiser.opening.models import Model
from mitune.denoiser.sampling import generate
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import Judgment
from mitune.pool.build import build_pool
from mitune.run.seals import SEAL, faults, read_seal
from tests.test_pool import PROMPTS, files_of
from tests.tiny import tiny_sd

CONFIG = PoolConfig(candidates=2, select=("self-confidence", "random"), batch_size=4)
CALL = {"guidance_scale": 3.0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def model():
    return Model(tiny_sd(), CALL, "/home/somebody/tiny-sd")


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    build_pool(model, PROMPTS, folder / "pool", CONFIG)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_a_set_knows_its_model_and_its_files(made):
    seal = read_seal(made / "sets" / "random")
    assert (seal["made"], seal["selection"], seal["model"]["name"]) == ("fine-tuning set", "random", "tiny-sd")
    assert seal["model"]["call"] == CALL and "unet" in seal["model"]["parts"]
    assert set(seal["files"]) == {path.name for path in (made / "sets" / "random").iterdir()} - {SEAL}
    assert "somebody" not in (made / "sets" / "random" / SEAL).read_text()


@pytest.mark.parametrize(
    "file",
    ["random/metadata.jsonl", "random/latents.safetensors", "random/conditioning.safetensors", "random/*.png", ""]
    + [f"random/{SEAL}", "../pool/candidates.parquet", "../pool/extremes/*.png", f"../pool/{SEAL}"],
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_what_is_missing_or_damaged_is_made_again(model, made, run, file, damage):
    path = next(iter((run / "sets").glob(file))) if file else run / "sets" / "random"
    if damage == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif path.is_file():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    build_pool(model, PROMPTS, run / "pool", CONFIG)
    assert files_of(run) == files_of(made)


def test_another_record_makes_another_set(made, run):
    """The same settings, but a pool that was made anew with another result."""
    for name in ("00000.json", "00000.parquet", "00000.safetensors"):
        (run / "pool" / "records" / name).unlink()
    other = Model(tiny_sd(seed=1), CALL, "tiny-sd")
    (run / "pool" / "settings.json").unlink()
    build_pool(other, PROMPTS, run / "pool", CONFIG)
    before, after = ((folder / "sets" / "random" / "latents.safetensors").read_bytes() for folder in (made, run))
    assert before != after and faults(run / "sets" / "random") == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_not_ours_stays(model, made, run, when):
    target = run / "sets" / "random"
    if when == "before":
        shutil.rmtree(run / "pool")
        shutil.rmtree(target)
        target.mkdir()
    else:
        (target / "metadata.jsonl").unlink()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(MituneError, match=r"random holds what mitune did not make \(thesis.txt\); move it away"):
        build_pool(model, PROMPTS, run / "pool", CONFIG)
    assert (target / "thesis.txt").read_text() == "mine"
    if when == "before":
        assert not (run / "pool" / "records").exists()
    shutil.rmtree(target)
    build_pool(model, PROMPTS, run / "pool", CONFIG)
    assert files_of(run) == files_of(made)


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_no_folder_in_the_place_of_a_set(model, tmp_path, kind):
    target, elsewhere = tmp_path / "sets" / "random", tmp_path / "elsewhere"
    target.parent.mkdir()
    if kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / "metadata.jsonl").write_text("mine")
    with pytest.raises(MituneError, match=f"random is a {kind.split()[-1]}; move it away"):
        build_pool(model, PROMPTS, tmp_path / "pool", CONFIG)
    assert not (tmp_path / "pool" / "records").exists()


def test_other_weights_of_the_same_name_are_refused(model, run):
    with pytest.raises(MituneError, match=r"holds a pool of other settings \(model.parts\.\w+: "):
        build_pool(Model(tiny_sd(seed=1), CALL, model.name), PROMPTS, run / "pool", CONFIG)


def spoil(monkeypatch, *prompts):
    def spoiled(model, chunk, batch_size, on_step):
        batch = generate(model, chunk, batch_size, on_step)
        for row, request in enumerate(chunk):
            if request.prompt in prompts:
                batch.latents[row] = torch.nan
        return batch

    monkeypatch.setattr("mitune.denoiser.sampling.generate", spoiled)


@pytest.mark.parametrize("select", ["contrast", "self-confidence", "fits", "random", "mi-tune@0.5", "early"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_prompt_without_any_image_costs_itself_alone(model, tmp_path, monkeypatch, caplog, select, place):
    spoil(monkeypatch, PROMPTS[place])
    config = PoolConfig(candidates=3, select=(select,), batch_size=3, race="off")
    result = build_pool(model, PROMPTS, tmp_path / "pool", config)
    assert f"no image of 1 prompts: {PROMPTS[place]}" in caplog.text
    (target,) = result.sets.values()
    lines = (target / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [p for p in PROMPTS if p != PROMPTS[place]]
    assert result.broken == 3
    assert build_pool(model, PROMPTS, tmp_path / "pool", config).sets == result.sets


class Bright:
    """Takes all images for right but those that came out as NaN, which would be black."""

    name, higher_is_better, bounds = "bright", True, (0.0, 1.0)

    def __call__(self, images, _prompts):
        assert all(np.asarray(image).any() for image in images)
        return [Judgment(graded=1.0, exact=True)] * len(images)


def test_judges_do_not_see_what_came_out_as_nan(model, tmp_path, monkeypatch):
    spoil(monkeypatch, PROMPTS[1])
    table = build_pool(model, PROMPTS, tmp_path / "pool", CONFIG, metric=Bright()).table
    rows = pq.read_table(table).to_pylist()
    assert [row["exact"] is None for row in rows] == [row["prompt"] == PROMPTS[1] for row in rows]


@pytest.mark.parametrize("count", [1, 5])
def test_a_model_that_makes_nothing_but_nan_is_named(tmp_path, monkeypatch, count):
    prompts = [*PROMPTS, "a blue ball", "two cubes"][:count]
    spoil(monkeypatch, *prompts)
    half = Model(tiny_sd().to(torch.bfloat16), CALL, "tiny-sd")
    with pytest.raises(MituneError, match=f"candidate of {min(count, 3)} prompts .* in bfloat16: .* set model.dtype"):
        build_pool(half, prompts, tmp_path / "pool", CONFIG)
    assert len(list((tmp_path / "pool" / "records").glob("*.json"))) == min(count, 3)
