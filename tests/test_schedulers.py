"""Which scheduler a model is used with: by the settings, by what a single file says of itself, by its folder."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import save_file

from mitune.config.resolve import resolve
from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.opening.schedulers import options_of_file, scheduler_for
from mitune.denoiser.path import path_of
from mitune.errors import MituneError, ModelError
from tests.test_models import as_one_file
from tests.tiny import tiny_sd


@pytest.fixture
def file(tmp_path):
    """Writes Stable Diffusion as one file, with further keys and header entries."""

    def write(keys=(), **header):
        state = as_one_file(tiny_sd()) | {key: torch.zeros(0) for key in keys}
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(state, place, metadata={name.replace("__", "."): value for name, value in header.items()})
        return place

    return write


def config_of(name, **settings):
    return ModelConfig(name=str(name), device="cpu", **settings)


def both(config):
    """The scheduler that sampling and scoring use, and that of training."""
    return load_model(config).pipe.scheduler, Components.of(config).scheduler()


class TestSettings:
    def test_class_and_options(self, sd_folder):
        given = {"name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "use_karras_sigmas": True}
        for scheduler in both(config_of(sd_folder, scheduler=given)):
            assert type(scheduler) is EulerDiscreteScheduler
            assert scheduler.config.timestep_spacing == "trailing" and scheduler.config.use_karras_sigmas
            assert scheduler.config.beta_end == 0.012  # of the folder

    def test_options_alone(self, sd_folder):
        for scheduler in both(config_of(sd_folder, scheduler={"prediction_type": "v_prediction"})):
            assert type(scheduler) is DDIMScheduler and path_of(scheduler).predicts == "velocity"

    def test_none(self, sd_folder):
        for scheduler in both(config_of(sd_folder)):
            assert scheduler.config.prediction_type == "epsilon" and scheduler.config.steps_offset == 1

    def test_on_the_command_line(self):
        given = ["model.scheduler.name=DDIMScheduler", "model.scheduler.rescale_betas_zero_snr=true"]
        config = resolve(assignments=given)
        assert config.model.scheduler == {"name": "DDIMScheduler", "rescale_betas_zero_snr": True}

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"name": "DDIMSchedular"}, r"is no scheduler of diffusers \(did you mean .*DDIMScheduler.*\?\); give the"),
            ({"name": "UNet2DModel"}, "is no scheduler of diffusers.*; give the name of a class"),
            ({"timestep_spacng": "leading"}, r"no option of DDIMScheduler \(did you mean timestep_spacing.*\); it has"),
            ({"timestep_spacing": "sideways"}, r"makes no DDIMScheduler \(sideways is not supported"),
            ({"name": "EDMEulerScheduler"}, "EDMEulerScheduler has no noise path that mitune knows"),
            ({"prediction_type": "score"}, "prediction_type='score'; mitune knows epsilon"),
        ],
    )
    def test_refusals(self, given, sentence):
        with pytest.raises(MituneError, match=sentence):
            scheduler_for(ModelConfig(scheduler=given), DDIMScheduler())

    def test_of_another_path(self):
        """A flow model's scheduler has no options of a diffusion model's."""
        with pytest.raises(ModelError, match="prediction_type is no option of FlowMatchEulerDiscreteScheduler"):
            scheduler_for(ModelConfig(scheduler={"prediction_type": "epsilon"}), FlowMatchEulerDiscreteScheduler())


class TestSingleFiles:
    @pytest.mark.parametrize(
        ("keys", "header"),
        [
            (("v_pred",), {}),
            ((), {"modelspec__prediction_type": "v"}),
            ((), {"ss_v_parameterization": "True"}),
        ],
    )
    def test_velocity(self, file, sd_folder, keys, header):
        for scheduler in both(config_of(file(keys, **header), base=str(sd_folder))):
            path = path_of(scheduler)
            assert path.predicts == "velocity" and path.log_snr(torch.tensor(999)).isfinite()

    @pytest.mark.parametrize(
        ("keys", "header"), [(("v_pred", "ztsnr"), {}), (("v_pred",), {"ss_zero_terminal_snr": "True"})]
    )
    def test_zero_terminal_snr(self, file, sd_folder, keys, header):
        for scheduler in both(config_of(file(keys, **header), base=str(sd_folder))):
            path = path_of(scheduler)
            assert path.predicts == "velocity" and path.log_snr(torch.tensor(999)).item() == -torch.inf
            scheduler.set_timesteps(10)
            assert scheduler.timesteps[0] == 999

    def test_nothing(self, file, sd_folder):
        for header in ({}, {"modelspec__prediction_type": "epsilon", "ss_v_parameterization": "False"}):
            assert options_of_file(str(file(**header))) == {}
            for scheduler in both(config_of(file(**header), base=str(sd_folder))):
                assert path_of(scheduler).predicts == "epsilon"

    def test_settings_go_first(self, file, sd_folder):
        given = {"prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": False}
        for scheduler in both(config_of(file(("v_pred", "ztsnr")), base=str(sd_folder), scheduler=given)):
            assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.rescale_betas_zero_snr

    def test_what_its_scheduler_cannot_do(self, file):
        config = config_of(file(("v_pred", "ztsnr")), base="base")
        with pytest.raises(ModelError, match="needs rescale_betas_zero_snr = True, which PNDMScheduler does not have"):
            scheduler_for(config, PNDMScheduler())

    def test_unknown_noise_levels(self, file):
        config = config_of(file(("v_pred", "edm_vpred.sigma_max")), base="base")
        with pytest.raises(ModelError, match="trained for EDM's noise levels, which mitune does not know"):
            scheduler_for(config, DDIMScheduler())
