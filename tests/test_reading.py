"""What a pipeline's call reads of a text, against what its denoiser is really told."""

import pytest
import torch

from mitune.bench import race, select
from mitune.config.schema import Config, EvalConfig, ModelConfig, PoolConfig
from mitune.denoiser.opening.models import Model, load_model, prompted
from mitune.denoiser.probe import MIProbe
from mitune.denoiser.reading import cut_texts
from mitune.errors import MituneError
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.variant import Variant
from mitune.pool.build import build_pool
from mitune.prompts.negatives import hard_negatives
from mitune.prompts.rivals import NEGATIVES, read_whole
from mitune.scoring import score
from mitune.worlds.base import Listed
from mitune.worlds.shapes.figure import save_grid
from mitune.worlds.shapes.metric import ShapesMetric
from mitune.worlds.shapes.prompts import prompt_list
from tests.families import CASES
from tests.tiny import PROMPTS, SD3_CALL, TOKENS, tiny_sd, tiny_sd3, tiny_sdxl

# Words that go: the limit of the call, less what is put around them (two special tokens of CLIP, one of the others).
LENGTHS = {
    "SD 1.x, 2.x base (epsilon)": TOKENS - 2,
    "SD 2.x (v)": TOKENS - 2,
    "SDXL": TOKENS - 2,
    "SD3, SD3.5": TOKENS - 2,  # by CLIP: its T5 has a token for each letter
    "PixArt-alpha": 119,
    "PixArt-Sigma": 299,
    "Sana": TOKENS - 1,
    "AuraFlow": TOKENS - 1,
    "HunyuanDiT": 255,  # of T5; BERT reads 77
    "Lumina 2": 11,  # its template has four tokens
    "CogView4": 1023,
    "Qwen-Image": TOKENS - 2,  # the template takes two; what it puts behind may be cut
    "Chroma": 5,
    "Z-Image": 13,  # a chat's template puts two words before the text
    "Flux (true CFG)": TOKENS - 2,  # of CLIP; its T5 is told to read 3
    "Wan 2.1 (video)": TOKENS - 1,
    "LTX-Video (video)": TOKENS - 1,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_families(name):
    """A prompt of exactly the length goes, alone and among others, and one word more is cut."""
    case, count = CASES[name], LENGTHS[name]
    pipe = case.make()
    state = torch.get_rng_state()
    fits, longer = ("ball " * count).strip(), ("ball " * (count + 1)).strip()
    assert cut_texts(pipe, [fits], case.call) == {}
    cut = cut_texts(pipe, ["a", longer, fits, "blue " + fits], case.call)
    assert list(cut) == [longer, "blue " + fits]
    assert cut[longer].tokens == cut[longer].limit + 1
    assert torch.equal(torch.get_rng_state(), state)
    assert cut_texts(pipe, [fits], case.call) == {}  # nothing is left behind


def told(pipe, text, call):
    """The conditioning of one prompt, from a whole call."""
    with MIProbe(pipe) as probe:
        pipe(
            **prompted(pipe, [text], call),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return probe.conditioning.to_tensors()


@pytest.mark.parametrize("name", ["SD 1.x, 2.x base (epsilon)", "SDXL", "Sana", "Lumina 2", "Qwen-Image", "Z-Image"])
def test_what_the_denoiser_is_told(name):
    """The last word of a prompt of the length is heard, and one behind it is not."""
    case, count = CASES[name], LENGTHS[name]
    pipe = case.make()
    head = "ball " * (count - 1)
    heard = [told(pipe, head + last, case.call) for last in ("red", "blue")]
    assert any(not torch.equal(heard[0][key], heard[1][key]) for key in heard[0])
    unheard = [told(pipe, head + "ball " + last, case.call) for last in ("red", "blue")]
    assert all(torch.equal(unheard[0][key], unheard[1][key]) for key in unheard[0])


class TestLimits:
    def test_the_call_names_the_length(self):
        pipe, text = CASES["AuraFlow"].make(), "a " * TOKENS
        call = CASES["AuraFlow"].call
        assert cut_texts(pipe, [text], call)
        assert not cut_texts(pipe, [text], call | {"max_sequence_length": TOKENS + 1})

    def test_an_absent_encoder_reads_nothing(self):
        """SD3 without T5 reads what CLIP does, though the tokenizer of T5 may be there."""
        pipe = CASES["SD3, SD3.5"].make()
        assert not cut_texts(pipe, ["a " * 40], {"max_sequence_length": 256})
        pipe.text_encoder_3 = None
        assert cut_texts(pipe, ["a " * 40], {"max_sequence_length": 256})["a " * 40].limit == TOKENS

    def test_negative_prompts(self):
        for pipe in (tiny_sd(), tiny_sdxl()):
            call = {"height": 16, "width": 16}
            assert not cut_texts(pipe, PROMPTS, call | {"negative_prompt": "a " * (TOKENS - 2)})
            with pytest.raises(MituneError, match="negative_prompt in model.call has 25 tokens, but .* reads 24"):
                cut_texts(pipe, PROMPTS, call | {"negative_prompt": "a " * (TOKENS - 1)})

    def test_a_failure_leaves_nothing_behind(self):
        pipe = tiny_sd()
        kinds = type(pipe.tokenizer), pipe.text_encoder.forward.__func__
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            cut_texts(pipe, PROMPTS, {"callback_on_step_end_tensor_inputs": ["nothing"]})
        assert (type(pipe.tokenizer), pipe.text_encoder.forward.__func__) == kinds
        assert not pipe.unet._forward_pre_hooks


class TestPython:
    LONG = ("red " * (TOKENS - 1)).strip()

    def test_score(self):
        for pipe, call in ((tiny_sd(), {}), (tiny_sd3(), SD3_CALL)):
            with pytest.raises(MituneError, match="^prompt 2: 25 tokens, but a call of this model reads 24"):
                score(pipe, torch.randn(2, 4, 8, 8), [PROMPTS[0], self.LONG], draws=4, call=call)

    def test_pool(self, tmp_path):
        model = Model(tiny_sd(), {"num_inference_steps": 3, "guidance_scale": 3.0}, "tiny")
        with pytest.raises(MituneError, match="prompt 2: 25 tokens"):
            build_pool(model, [*PROMPTS[:1], self.LONG], tmp_path / "pool", PoolConfig(candidates=2))
        assert not (tmp_path / "pool").exists()

    def test_evaluation(self, sd_folder, tmp_path):
        config = Config(model=ModelConfig(name=str(sd_folder), device="cpu", steps=2), eval=EvalConfig(images=1))
        prompts = [Listed(PROMPTS[0]), Listed(self.LONG)]
        with pytest.raises(MituneError, match="prompt 2: 25 tokens"):
            evaluate(config, prompts, [Variant(name="base")], tmp_path / "eval", ShapesMetric())
        assert not list((tmp_path / "eval").rglob("*.safetensors"))

    def test_studies(self, sd_folder, tmp_path):
        """The words of the shapes are unknown to this model, which reads them letter by letter."""
        settings, prompts = ModelConfig(name=str(sd_folder), device="cpu"), prompt_list("color")[:2]
        for study in (
            lambda: select.run_study([settings], prompts, tmp_path / "select", select.SelectConfig()),
            lambda: race.run_study(settings, prompts, tmp_path / "race", race.RaceConfig()),
            lambda: save_grid(load_model(settings), tmp_path / "grid.png", images=1, seed=0),
        ):
            with pytest.raises(MituneError, match=r"^prompt \d: \d\d tokens, but a call of this model reads 24"):
                study()
        assert not [file for file in tmp_path.rglob("*") if file.suffix in (".safetensors", ".png")]

    def test_rivals_that_would_be_cut_are_left_out(self, tmp_path):
        """Of the hard negatives of a long prompt some are longer still, as they have unknown words."""
        model = Model(tiny_sd(), {"num_inference_steps": 4, "guidance_scale": 3.0}, "tiny")
        model.pipe.tokenizer.model_max_length = 20
        prompt = "a red ball and a blue ball and a red ball"
        negatives = [negative.prompt for negative in hard_negatives(prompt)]
        left = read_whole(model, {NEGATIVES: negatives})[NEGATIVES]
        assert left == [text for text in negatives if len(model.pipe.tokenizer(text).input_ids) <= 20]
        assert 0 < len(left) < len(negatives)
        pool = build_pool(model, [prompt], tmp_path / "pool", PoolConfig(candidates=4, batch_size=4))
        assert list(pool.sets) == ["contrast"]
