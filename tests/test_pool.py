"""The pool's promises: a candidate is a function of its prompt and seed alone, and a stopped run ends the same."""

import json
from dataclasses import replace

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import mitune.pool.build
from mitune.config.schema import PoolConfig
from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode
from mitune.denoiser.sampling import Request, candidate_seed, generate, generate_all
from mitune.errors import MituneError
from mitune.information import SCORES, Trace, get_score
from mitune.pool.build import build_pool
from tests.tiny import tiny_sd, tiny_sd3

PROMPTS = ["a red circle", "a blue square", "two green crosses"]


@pytest.fixture(scope="module", params=["sd", "sd3"])
def model(request):
    if request.param == "sd":
        return Model(tiny_sd(), {"guidance_scale": 3.0, "num_inference_steps": 4}, "tiny-sd")
    call = {"guidance_scale": 3.0, "num_inference_steps": 4, "max_sequence_length": 0}
    return Model(tiny_sd3(), call, "tiny-sd3")


def requests(count=6):
    return [Request(prompt=PROMPTS[j % 3], seed=candidate_seed(0, PROMPTS[j % 3], j)) for j in range(count)]


def latents_by_seed(model, wanted, batch_size):
    return {
        request.seed: latents
        for chunk, batch in generate_all(model, wanted, batch_size)
        for request, latents in zip(chunk, batch.latents, strict=True)
    }


def test_candidates_do_not_depend_on_order_or_neighbors(model):
    """Bit for bit at one batch size, whatever stands beside them."""
    straight = latents_by_seed(model, requests(), 4)
    backwards = latents_by_seed(model, requests()[::-1], 4)
    alone = latents_by_seed(model, requests()[2:3], 4)
    for seed, latents in (backwards | alone).items():
        assert torch.equal(straight[seed], latents)


def test_another_batch_size_agrees_within_rounding(model):
    """Stated tolerance: 1e-4 of the latents' own scale."""
    four, three = latents_by_seed(model, requests(), 4), latents_by_seed(model, requests(), 3)
    for seed, latents in four.items():
        torch.testing.assert_close(three[seed], latents, rtol=0, atol=1e-4 * latents.std().item())


def files_of(folder):
    """Contents of every file; the seals are left out, as they repeat the others."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


CONFIG = PoolConfig(candidates=3, keep=2, select=("self-confidence", "mi-tune", "random"), batch_size=4)


def test_a_stopped_run_ends_with_the_same_files(model, tmp_path):
    build_pool(model, PROMPTS, tmp_path / "whole" / "pool", CONFIG)

    class Killed(Exception):
        pass

    def kill(done, _total):
        if done >= 8:
            raise Killed

    with pytest.raises(Killed):
        build_pool(model, PROMPTS, tmp_path / "stopped" / "pool", CONFIG, progress=kill)
    assert not (tmp_path / "stopped" / "pool" / "candidates.parquet").exists()
    build_pool(model, PROMPTS, tmp_path / "stopped" / "pool", CONFIG)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_shards_end_with_the_same_files(model, tmp_path):
    build_pool(model, PROMPTS, tmp_path / "whole" / "pool", CONFIG)
    assert not build_pool(model, PROMPTS, tmp_path / "shards" / "pool", CONFIG, shard=(0, 2)).sets
    assert build_pool(model, PROMPTS, tmp_path / "shards" / "pool", CONFIG, shard=(1, 2)).sets
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "whole")


def test_another_batch_size_keeps_the_same_candidates(model, tmp_path):
    for size in (4, 3):
        build_pool(model, PROMPTS, tmp_path / str(size) / "pool", replace(CONFIG, batch_size=size))
    rows = [pq.read_table(tmp_path / size / "pool" / "candidates.parquet").to_pydict() for size in "43"]
    for name in rows[0]:
        if name.startswith("kept."):
            assert rows[0][name] == rows[1][name]


def test_scores_can_be_computed_again_without_the_model(model, tmp_path):
    result = build_pool(model, PROMPTS, tmp_path / "pool", CONFIG)
    columns = pq.read_table(result.table).to_pydict()
    trace = Trace.from_columns(columns)
    for name in SCORES:
        expected = torch.tensor(columns[f"score.{name}"])
        torch.testing.assert_close(get_score(name).values(trace), expected, equal_nan=True)
    assert len(set(columns["seed"])) == len(PROMPTS) * CONFIG.candidates


def test_a_set_is_an_imagefolder_with_its_latents(model, tmp_path):
    folder = build_pool(model, PROMPTS, tmp_path / "pool", CONFIG).sets["self-confidence"]
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(loaded["prompt"]) == sorted(row["prompt"] for row in rows)
    latents = load_file(folder / "latents.safetensors")["latents"]
    conditioning = load_file(folder / "conditioning.safetensors")
    assert len(latents) == len(rows) == len(PROMPTS) * CONFIG.keep
    assert all(len(tensor) == len(rows) for tensor in conditioning.values())
    again = generate(model, [Request(prompt=rows[1]["prompt"], seed=rows[1]["seed"])], CONFIG.batch_size)
    assert torch.equal(again.latents[0], latents[1])
    states = again.passes.conditional.rows["encoder_hidden_states"]
    assert torch.equal(states[0], conditioning["encoder_hidden_states"][1])
    by_name = {row["file_name"]: i for i, row in enumerate(rows)}
    pixels = list(decode(model, latents))[by_name[rows[1]["file_name"]]]
    shown = next(item for item in loaded if item["prompt"] == rows[1]["prompt"] and item["seed"] == rows[1]["seed"])
    assert shown["image"].tobytes() == pixels.tobytes()


def test_nan_costs_one_candidate(model, tmp_path, monkeypatch, caplog):
    def spoiled(model, chunk, batch_size, on_step):
        batch = generate(model, chunk, batch_size, on_step)
        if chunk[0].prompt == PROMPTS[0]:
            batch.latents[0] = torch.nan
        return batch

    monkeypatch.setattr("mitune.denoiser.sampling.generate", spoiled)
    result = build_pool(model, PROMPTS, tmp_path / "pool", CONFIG)
    columns = pq.read_table(result.table).to_pydict()
    assert result.broken == columns["status"].count("nan") == 1
    assert not columns["kept.self-confidence"][0] and not columns["kept.random"][0]
    assert "left out" in caplog.text


def test_out_of_memory_costs_a_smaller_batch(model, monkeypatch, caplog):
    def scarce(model, chunk, batch_size, on_step):
        if batch_size > 2:
            raise torch.OutOfMemoryError
        return generate(model, chunk, batch_size, on_step)

    monkeypatch.setattr("mitune.denoiser.sampling.generate", scarce)
    assert len(latents_by_seed(model, requests(), 4)) == 6
    assert "batches of 2" in caplog.text


def test_other_settings_are_refused(model, tmp_path):
    build_pool(model, PROMPTS[:1], tmp_path / "pool", CONFIG)
    with pytest.raises(MituneError, match="holds a pool of other settings"):
        build_pool(model, PROMPTS[:2], tmp_path / "pool", CONFIG)


def test_a_score_without_a_value_at_these_steps_is_refused_at_the_first(model, tmp_path, monkeypatch):
    """Flow models have no β_t, and of DDIM's 4 steps the last is truncated. No latents are made."""
    name = {"tiny-sd": "late", "tiny-sd3": "mi-tune-discrete"}[model.name]
    chosen = replace(CONFIG, select=("self-confidence", name))
    with monkeypatch.context() as patch, pytest.raises(MituneError, match=f"'{name}' needs .* the 4 steps of this run"):
        patch.setattr("mitune.pool.build.check_pictures", lambda _: None)  # steps a scheduler of its own
        patch.setattr(type(model.pipe.scheduler), "step", lambda *_, **__: pytest.fail("a step was made"))
        build_pool(model, PROMPTS, tmp_path / "pool", chosen)
    assert not list((tmp_path / "pool").rglob("*.safetensors"))


def test_oracle_needs_a_judge(model, tmp_path):
    with pytest.raises(MituneError, match="neither model nor prompts come with a judge"):
        build_pool(model, PROMPTS, tmp_path / "pool", replace(CONFIG, select=("oracle",)))


def test_a_full_disk_stops_cleanly_and_goes_on(model, tmp_path, monkeypatch):
    real, calls = mitune.pool.build.Records.write, []

    def full(self, index, table, tensors):
        calls.append(index)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self, index, table, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("mitune.pool.build.Records.write", full)
        with pytest.raises((MituneError, OSError)):
            build_pool(model, PROMPTS, tmp_path / "stopped" / "pool", CONFIG)
    build_pool(model, PROMPTS, tmp_path / "stopped" / "pool", CONFIG)
    build_pool(model, PROMPTS, tmp_path / "whole" / "pool", CONFIG)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
