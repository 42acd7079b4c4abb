"""The embedded world of colored shapes, as the rest of mitune knows it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric
from mitune.worlds.base import EmbeddedModel, Listed, Negative
from mitune.worlds.shapes.grammar import CATEGORIES, PromptError
from mitune.worlds.shapes.negatives import shapes_negatives, wider_negatives
from mitune.worlds.shapes.prompts import shapes_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

_FOLDER = Path(str(files("mitune.worlds.shapes"))) / "models"
_CALL = {"guidance_scale": 2.0, "num_inference_steps": 12}
MODELS: Mapping[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="shapes-sd",
            folder=_FOLDER / "shapes-sd",
            call=_CALL,
            summary="a small Stable Diffusion: a U-Net that predicts noise",
        ),
        EmbeddedModel(
            name="shapes-sd3",
            folder=_FOLDER / "shapes-sd3",
            call=_CALL | {"max_sequence_length": 1},
            summary="a small Stable Diffusion 3: a transformer on a flow path",
        ),
    )
}


class ShapesWorld:
    """Prompts of a small grammar, their exact hard negatives, the judge, and two models (docs/shapes.md)."""

    models = MODELS
    commands = "mitune.worlds.shapes.cli:app"
    benchmarks = "mitune.worlds.shapes.cli:benchmarks"

    @property
    def metric(self) -> ImageMetric:
        """The exact judge."""
        from mitune.worlds.shapes.metric import ShapesMetric  # with numpy, which naming a model need not load

        return ShapesMetric()

    def prompts(self, name: str) -> list[Listed]:
        """`train` or `heldout`, whole or by category: `train/color`. Raises MituneError for another name."""
        try:
            return shapes_prompts(name)
        except KeyError as error:
            raise MituneError(
                f"There is no prompt list 'shapes:{name}'; use shapes:train or shapes:heldout, with a category if you "
                f"like (shapes:train/color; categories: {', '.join(CATEGORIES)})."
            ) from error

    def negatives(self, prompt: str) -> list[Negative] | None:
        """Exact ones: no scene of a prompt fits one of its negatives."""
        try:
            return shapes_negatives(prompt)
        except PromptError:
            return None

    def wider_negatives(self, prompt: str) -> list[Negative]:
        """One more of an object, a further object, each object exchanged for every other shape."""
        return wider_negatives(prompt)

    def rendered(self, category: str, count: int, seed: int) -> tuple[list[str], list[Image]]:
        """Scenes of random prompts of a category, as the renderer draws them."""
        from mitune.worlds.shapes.rendered import rendered_scenes  # with numpy, as above

        return rendered_scenes(category, count, seed)


WORLD = ShapesWorld()
