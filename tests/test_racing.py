"""Racing: those that stay come out as without a race, and the schedule's arithmetic is what it says."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mitune.bench.race import replay
from mitune.config.schema import PoolConfig
from mitune.denoiser.batches import constant_batches, texts_encoded_once
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.models import Model
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.sampling import generate, requests_of
from mitune.errors import MituneError
from mitune.information import SCORES, get_score
from mitune.pool.build import build_pool
from mitune.pool.race import Race
from mitune.prompts.rivals import NEGATIVES, rivals_of
from tests.families import CASES
from tests.families import PROMPTS as TEXTS
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3

PROMPTS = ["a red circle", "a blue square", "two green crosses"]
STEPS = 8
HALVING = ((0.25, 0.5), (0.5, 0.25))
CONFIG = PoolConfig(candidates=8, keep=1, select=("self-confidence", "mi-tune"), batch_size=4, race=HALVING)


@pytest.fixture(scope="module", params=["sd", "sd3", "separate calls"])
def model(request):
    call = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
    if request.param == "sd":
        return Model(tiny_sd(), call, "tiny-sd")
    if request.param == "sd3":
        return Model(tiny_sd3(), call | SD3_CALL, "tiny-sd3")
    torch.manual_seed(0)
    case = CASES["CogView4"]
    return Model(case.make(), call | case.call, "tiny-cogview4")


def requests(candidates=8, prompts=PROMPTS):
    return requests_of(prompts, candidates, 0)


def race(**changes):
    settings = {"rungs": HALVING, "scores": ("rfmi",), "candidates": 8, "keep": 1}
    return Race(**settings | changes)


class TestSchedule:
    def test_halving(self):
        """8 candidates, 8 steps: 2 · 8 + 2 · 4 + 4 · 2 = 32 of 64 calls."""
        assert race().running(8) == [8, 8, 4, 4, 2, 2, 2, 2]

    def test_never_fewer_than_are_kept(self):
        assert race(keep=3).running(8) == [8, 8, 4, 4, 3, 3, 3, 3]
        assert min(race(candidates=1).running(8)) == 1

    def test_no_rung_after_the_last_step(self):
        assert race(rungs=((0.9, 0.5),)).running(5) == [8] * 5

    def test_two_rungs_on_one_step(self):
        assert race().running(2) == [8, 2]

    def test_survivors_are_the_best_of_each_prompt_by_any_score(self):
        scores = {"a": [1, 2, 3, 4, 8, 7, 6, 5], "b": [9, 0, 0, 0, 0, 0, 0, 9]}
        assert race(candidates=4).survivors(range(8), scores, 1) == [0, 3, 4, 7]

    def test_broken_ones_go_first_and_unknown_ones_stay(self):
        nan = float("nan")
        assert race(candidates=4).survivors(range(8), {"a": [nan, 1, 2, 0, nan, nan, nan, nan]}, 2) == [
            1,
            2,
            4,
            5,
            6,
            7,
        ]

    @pytest.mark.parametrize("batch_size", [1, 4, 7, 16, 100])
    def test_prompts_together_leave_little_of_a_batch_empty(self, batch_size):
        fifty = race(candidates=50)
        prompts = fifty.prompts_together(20, batch_size)
        running = fifty.running(20)
        made = sum(-(-prompts * count // batch_size) * batch_size for count in running)
        assert made <= 1.25 * prompts * sum(running)
        assert prompts * 50 <= max(50, 8 * batch_size)

    @pytest.mark.parametrize("rungs", [((0.5, 0.5), (0.25, 0.25)), ((0.5, 1.0),), ((1.0, 0.5),), ((0.5,),)])
    def test_impossible_rungs_are_refused(self, rungs):
        with pytest.raises(MituneError, match=r"pool\.race(\[0\])*(\[1\])? = .* must be a"):
            PoolConfig(race=rungs)


class TestLatents:
    def test_those_that_stay_come_out_the_same(self, model):
        """Bit for bit, with the denoiser in batches of 4: alone, in a race, and in one batch with other prompts."""
        whole = generate(model, requests(), 4)
        raced = generate(model, requests(), 4, race().drop)
        left = [place for place, step in enumerate(raced.dropped) if not step]
        assert [sum(place // 8 == prompt for place in left) for prompt in range(3)] == [2, 2, 2]
        assert sorted(set(raced.dropped)) == [0, 2, 4]
        assert torch.equal(raced.latents[left], whole.latents[left])
        assert raced.latents[[p for p in range(24) if p not in left]].isnan().all()
        for name in SCORES:
            expected = get_score(name).values(whole.trace)[left]
            torch.testing.assert_close(get_score(name).values(raced.trace)[left], expected, equal_nan=True)
        alone = generate(model, requests()[8:16], 4, race().drop)
        assert torch.equal(alone.latents.nan_to_num(), raced.latents[8:16].nan_to_num())
        assert alone.dropped == raced.dropped[8:16]
        one = generate(model, [requests()[left[0]]], 4)
        assert torch.equal(one.latents[0], whole.latents[left[0]])
        for name, tensor in whole.passes.to_tensors().items():
            assert torch.equal(raced.passes.to_tensors()[name], tensor)

    def test_the_replay_is_the_race(self, model):
        so_far = []
        batch = generate(model, requests(), 4, lambda probe: so_far.append(SCORES["rfmi"].values(probe.trace_so_far())))
        raced = generate(model, requests(), 4, race().drop)
        scores = np.stack(so_far[:-1] + [SCORES["rfmi"](batch.trace)], axis=1)
        for prompt in range(3):
            left, calls = replay(scores[8 * prompt : 8 * prompt + 8], HALVING)
            assert left == [j for j in range(8) if not raced.dropped[8 * prompt + j]]
            assert calls == sum(step or STEPS for step in raced.dropped[8 * prompt : 8 * prompt + 8])


class TestPartWay:
    def test_the_last_of_the_partial_traces_is_the_whole_one(self, model):
        """But for the errors, which a prediction of the end stands in for; with it, the last one's own error is 0."""
        traces = []
        batch = generate(model, requests(2), 6, lambda probe: traces.append(probe.trace_so_far()))
        assert [trace.difference.shape[1] for trace in traces] == list(range(1, STEPS + 1))
        assert torch.equal(traces[-1].difference, batch.trace.difference)
        last = traces[-1]
        assert (last.error_conditional[:, -1] < 1e-5 + 1e-3 * last.error_null[:, -1]).all()
        assert last.error_conditional[:, 1].isfinite().all()


class TestBatches:
    def test_the_denoiser_sees_one_shape(self, model):
        shapes, forward = set(), denoiser_of(model.pipe).forward

        @functools.wraps(forward)
        def noted(*args, **kwargs):
            shapes.add((args[0] if args else kwargs.get("hidden_states")).shape)
            return forward(*args, **kwargs)

        denoiser_of(model.pipe).forward = noted
        try:
            generate(model, requests(), 4, race().drop)
        finally:
            del denoiser_of(model.pipe).forward
        assert len(shapes) == 1

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if "prompt" not in case.call])
    def test_every_family(self, name):
        """Three candidates two by two, with texts encoded alone, are those of the pipeline's own call."""
        torch.manual_seed(0)
        case = CASES[name]
        pipe = case.make()
        guidance = {case.guidance: 3.0} | ({"negative_prompt": [" "] * 3} if "true" in case.guidance else {})

        def latents():
            return pipe(
                prompt=[TEXTS[0]] * 3, num_inference_steps=3, output_type="latent",
                generator=[torch.Generator().manual_seed(j) for j in range(3)],
                **guidance | case.call,
            )[0]  # fmt: skip

        expected = latents()
        with texts_encoded_once(pipe), constant_batches(pipe, 2), MIProbe(pipe, guidance_scale=3.0) as probe:
            made = latents()
        assert len(probe.trace(made)) == 3
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)

    def test_each_text_is_encoded_once(self):
        pipe, rows = tiny_sd(), []
        forward = pipe.text_encoder.forward

        def noted(ids, *args, **kwargs):
            rows.append(len(ids))
            return forward(ids, *args, **kwargs)

        pipe.text_encoder.forward = noted
        generate(Model(pipe, {"guidance_scale": 3.0, "num_inference_steps": 2}, "tiny"), requests(4), 4)
        assert rows == [1] * (3 + 1)  # three prompts and the empty one, which is encoded in a call of its own
        assert pipe.text_encoder.forward is noted


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


class TestPool:
    @pytest.fixture(scope="class")
    def model(self):
        return Model(tiny_sd(), {"guidance_scale": 3.0, "num_inference_steps": STEPS}, "tiny-sd")

    def test_the_record_says_who_was_dropped_and_when(self, model, tmp_path):
        one = replace(CONFIG, select=("mi-tune",))
        result = build_pool(model, PROMPTS, tmp_path / "pool", one)
        rows = pq.read_table(result.table).to_pylist()
        assert sorted({row["status"] for row in rows}) == ["dropped at step 2", "dropped at step 4", "ok"]
        for row in rows:
            finished = row["status"] == "ok"
            assert row["steps"] == (STEPS if finished else int(row["status"].split()[-1]))
            assert np.isfinite(row["score.mi-tune"]) == np.isfinite(row["score.self-confidence"]) == finished
            assert finished or not row["kept.mi-tune"]
        assert (result.denoiser_calls, result.unraced_calls, result.broken) == (3 * 32, 3 * 64, 0)
        again = build_pool(model, PROMPTS, tmp_path / "pool", one)
        assert (again.denoiser_calls, again.unraced_calls) == (3 * 32, 3 * 64)

    def test_a_race_that_drops_nobody_selects_the_same(self, model, tmp_path):
        for name, rungs in (("raced", ((0.5, 0.95),)), ("whole", "off")):
            result = build_pool(model, PROMPTS, tmp_path / name / "pool", replace(CONFIG, race=rungs))
            assert result.denoiser_calls == result.unraced_calls
        tables = [pq.read_table(tmp_path / name / "pool" / "candidates.parquet") for name in ("raced", "whole")]
        assert tables[0].equals(tables[1])

    def test_a_stopped_race_ends_with_the_same_files(self, model, tmp_path):
        class Killed(Exception):
            pass

        def kill(_done, _total):
            raise Killed

        prompts = [*PROMPTS, "a ball", "two balls", "red", "blue"]  # more than one call of the pipeline holds
        build_pool(model, prompts, tmp_path / "whole" / "pool", CONFIG)
        with pytest.raises(Killed):
            build_pool(model, prompts, tmp_path / "stopped" / "pool", CONFIG, progress=kill)
        made = len(list((tmp_path / "stopped" / "pool" / "records").glob("*.json")))
        assert 0 < made < len(prompts)
        build_pool(model, prompts, tmp_path / "stopped" / "pool", CONFIG)
        assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
        for shard in (0, 1):
            build_pool(model, prompts, tmp_path / "shards" / "pool", CONFIG, shard=(shard, 2))
        assert files_of(tmp_path / "shards") == files_of(tmp_path / "whole")

    @pytest.mark.parametrize("rule", ["random", "oracle", "mi-tune@0.9", "fits"])
    def test_selections_that_need_all_are_refused(self, model, tmp_path, rule):
        config = replace(CONFIG, select=("mi-tune", rule))
        with pytest.raises(MituneError, match=r"needs all of them finished; leave that out, or set pool.race=off"):
            build_pool(model, PROMPTS, tmp_path / "pool", config, metric=lambda _images, _prompts: [])

    @pytest.mark.parametrize(
        ("select", "raced"),
        [("contrast", True), ("self-confidence", True), ("self-confidence@0.5", False), ("mi-tune", False)],
    )
    def test_by_default_where_self_confidence_decides(self, model, tmp_path, select, raced):
        config = replace(CONFIG, select=(select,), race="auto")
        result = build_pool(model, PROMPTS[:1], tmp_path / "pool", config)
        assert (result.denoiser_calls < result.unraced_calls) == raced
        both = build_pool(model, PROMPTS[:1], tmp_path / "both", replace(config, select=(select, "random")))
        assert both.denoiser_calls == both.unraced_calls

    def test_a_second_stage_has_a_choice(self, model, tmp_path):
        config = replace(CONFIG, select=("contrast",), keep=3)
        rows = pq.read_table(build_pool(model, PROMPTS[:1], tmp_path / "pool", config).table)
        assert np.isfinite(np.array(rows["score.contrast"])).sum() == 6
        # Six images under the prompt and its rivals, at ε and −ε; a step of all these texts, and one text repeated
        texts = 1 + len(rivals_of(PROMPTS[0], ())[NEGATIVES])
        assert sum(rows["further_calls"].to_pylist()) == pytest.approx(6 * texts * 2 / 2 + texts + 1)
        assert rows["kept.contrast"].to_pylist().count(True) == 3

    def test_in_two_stages_the_first_decides_the_race(self, model, tmp_path):
        config = replace(CONFIG, select=("contrast",))
        rows = pq.read_table(build_pool(model, PROMPTS, tmp_path / "pool", config).table).to_pylist()
        alone = build_pool(model, PROMPTS, tmp_path / "alone" / "pool", replace(config, select=("self-confidence",)))
        assert [row["status"] for row in rows] == pq.read_table(alone.table)["status"].to_pylist()
        for prompt in PROMPTS:
            own = [row for row in rows if row["prompt"] == prompt]
            assert [math.isfinite(row["score.contrast"]) for row in own] == [row["status"] == "ok" for row in own]
            best = max(
                (row for row in own if row["status"] == "ok"),
                key=lambda row: (row["score.contrast"], row["score.self-confidence"]),
            )
            assert [row for row in own if row["kept.contrast"]] == [best]

    def test_only_those_that_stay_are_judged(self, model, tmp_path):
        from mitune.evaluation.metrics.base import Judgment

        seen = []

        class Counting:
            name, higher_is_better, bounds = "counting", True, None

            def __call__(self, images, prompts):
                seen.append(len(images))
                return [Judgment(graded=1.0, exact=True) for _ in prompts]

        config = replace(CONFIG, select=("mi-tune",))
        rows = pq.read_table(build_pool(model, PROMPTS, tmp_path / "pool", config, metric=Counting()).table).to_pylist()
        assert seen == [2, 2, 2]
        assert [row["exact"] for row in rows] == [True if row["status"] == "ok" else None for row in rows]

    def test_the_batch_size_found_is_kept(self, model, tmp_path, monkeypatch, caplog):
        def scarce(model, chunk, batch_size, on_step):
            if batch_size > 4:
                raise torch.OutOfMemoryError
            return generate(model, chunk, batch_size, on_step)

        monkeypatch.setattr("mitune.denoiser.sampling.generate", scarce)
        config = replace(CONFIG, batch_size=None)
        build_pool(model, PROMPTS[:1], tmp_path / "pool", config)
        assert json.loads((tmp_path / "pool" / "batch_size.json").read_text()) == {"batch_size": 4}
        assert "batches of 4" in caplog.text
        caplog.clear()
        (tmp_path / "pool" / "records" / "00000.json").unlink()
        build_pool(model, PROMPTS[:1], tmp_path / "pool", config)
        assert "Out of memory" not in caplog.text
