"""Bad arguments of a pipeline's call are one sentence that names model.call; mitune's own faults stay what they are."""

import pytest
import torch
from diffusers import DiTPipeline, FluxPipeline, KandinskyV22Pipeline, StableDiffusion3Pipeline, StableDiffusionPipeline

from mitune.denoiser.opening.calls import calling, check_call, size_grid
from mitune.denoiser.opening.models import Model
from mitune.denoiser.replay import condition
from mitune.denoiser.sampling import Request, generate
from mitune.errors import ModelError
from tests.families import flux
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3

REQUESTS = [Request(prompt="a red ball", seed=0)]
STEPS = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("kind", "call", "sentence"),
    [
        (StableDiffusionPipeline, {"heigth": 512}, "takes no heigth; set in model.call what it does take: height"),
        (StableDiffusionPipeline, {"max_sequence_length": 77}, "The call of StableDiffusionPipeline takes no max_seq"),
        (StableDiffusion3Pipeline, {"prompt": "a cat"}, "names prompt, which mitune gives the pipeline itself"),
        (StableDiffusion3Pipeline, {"num_images_per_prompt": 2}, "names num_images_per_prompt, which mitune gives"),
        (StableDiffusionPipeline, {"height": 512}, "names one of height and width; name both"),
        (FluxPipeline, {"self": 1}, "takes no self"),
        (DiTPipeline, {}, "^DiTPipeline is not called with prompts and model.call alone .*; take a text-to-image"),
        (KandinskyV22Pipeline, {"height": 64, "width": 64}, "^KandinskyV22Pipeline is not called with prompts and"),
    ],
)
def test_names(kind, call, sentence):
    with pytest.raises(ModelError, match=sentence):
        check_call(kind, call)


def test_what_a_pipeline_takes():
    check_call(StableDiffusion3Pipeline, {"height": 512, "width": 768, "max_sequence_length": 256, "prompt_2": "grey"})


@pytest.mark.parametrize(
    ("make", "call", "sentence"),
    [
        (tiny_sd, {"height": 16, "width": 15}, "height and width must be multiples of 2, e.g. width = 14"),
        (
            tiny_sd3,
            {"height": 18, **SD3_CALL},
            "height and width must be multiples of 4, e.g. height = 16: set",
        ),
        (tiny_sd3, {"width": 3, **SD3_CALL}, "multiples of 4, e.g. width = 4"),
        (tiny_sd3, {"height": "16", **SD3_CALL}, "cannot be called with .*height = '16'"),
        (tiny_sd3, {"max_sequence_length": 9999}, "cannot be called with .*max_sequence_length = 9999"),
        (tiny_sd, {"negative_prompt": 3}, "cannot be called with .*negative_prompt = 3"),
        (tiny_sd, {"timesteps": [1, 2]}, r"cannot be called with .*timesteps = \[1, 2\]"),
    ],
)
def test_values(make, call, sentence):
    model = Model(make(), {**STEPS, **call}, "tiny")
    for run in (lambda: generate(model, REQUESTS, 1), lambda: condition(model, ["a red ball"])):
        with pytest.raises(ModelError, match=sentence):
            run()


def test_grids():
    assert [size_grid(pipe) for pipe in (tiny_sd(), tiny_sd3(), flux())] == [2, 4, 4]


def test_faults_of_mitune_stay():
    def faulty(_probe):
        raise TypeError("in a hook")

    def full(_probe):
        raise torch.OutOfMemoryError("full")

    model = Model(tiny_sd(), STEPS, "tiny")
    with pytest.raises(TypeError, match="in a hook"):  # called by the probe
        generate(model, REQUESTS, 1, faulty)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, REQUESTS, 1, full)
    with pytest.raises(ModelError, match="cannot be called with its own defaults"), calling(tiny_sd(), {}):
        tiny_sd()(prompt=3)
