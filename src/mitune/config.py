"""Every setting of a run, as frozen dataclasses: a default lives here once and is checked when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from mitune.errors import MituneError

Rungs = tuple[tuple[float, float], ...]
GRADUAL: Rungs = ((0.2, 0.6), (0.35, 0.45), (0.5, 0.3), (0.65, 0.25))  # half the calls of no race; docs/racing.md


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise MituneError(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which pipeline makes the images, and how it is called. None: the model's own default."""

    name: str = "shapes-sd"  # hub id, folder, single .safetensors file, or the name of an embedded model
    base: str | None = None  # of a single file: hub id or folder of the pipeline that it is a part of, or all
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"  # "auto" takes the GPU if there is one
    offload: Literal["none", "model", "sequential"] = "none"  # parts that wait stay on the CPU: slower, less memory
    compile: bool = False  # the denoiser, with torch.compile: minutes at first, then faster; pays on long runs
    guidance_scale: float | None = None
    steps: int | None = None
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call, e.g. height

    def __post_init__(self) -> None:
        scale, steps = self.guidance_scale, self.steps
        _require(bool(self.name), "model.name is empty; give a hub id, a folder, or an embedded model (shapes-sd).")
        _require(
            not self.name.endswith((".ckpt", ".pt", ".pth", ".bin")),
            f"model.name = {self.name} is a file that may run code when opened; convert it to .safetensors.",
        )
        _require(
            self.is_single_file == (self.base is not None),
            f"model.name = {self.name} and model.base = {self.base} do not fit: a single .safetensors file, and it "
            "alone, needs a base, the hub id or folder of the pipeline that it is part of.",
        )
        _require(
            scale is None or scale > 1,
            f"model.guidance_scale = {scale} must be above 1: at 1 or below, pipelines skip the pass without the "
            "prompt, and mutual information needs both.",
        )
        _require(
            not (self.compile and self.offload == "sequential"),
            "model.compile needs the denoiser in one piece; set model.offload to model or none, or compile to false.",
        )
        _require(steps is None or steps >= 2, f"model.steps = {steps} must be at least 2.")

    @property
    def is_single_file(self) -> bool:
        """Whether all weights are in one file, as other programs keep them."""
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How many candidates a prompt gets, and which stay (Algorithm 1 of MI-TUNE)."""

    candidates: int = 50  # M
    keep: int = 1  # k
    select: tuple[str, ...] = ("contrast",)  # scores or controls; each makes a set of its own
    batch_size: int | None = None  # candidates in one call of the denoiser; None: as many as fit
    # Rungs of a race: after this share of the steps, this share of a prompt's candidates stays, by the scores of
    # `select`. None: GRADUAL where these all begin with self-confidence, else no race. Empty: never.
    race: Rungs | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            1 <= self.keep <= self.candidates,
            f"pool.keep = {self.keep} must lie between 1 and pool.candidates = {self.candidates}.",
        )
        _require(
            self.batch_size is None or self.batch_size >= 1, f"pool.batch_size = {self.batch_size} must be at least 1."
        )
        rungs = self.race or ()
        ends = [(0.0, 1.0), *rungs]
        _require(
            all(len(rung) == 2 for rung in ends) and all(a < c < 1 and b > d > 0 for (a, b), (c, d) in pairwise(ends)),
            f"pool.race = {[list(rung) for rung in rungs]} must be a list of [share of the steps, share of the "
            "candidates that stays], the first rising and the second falling, e.g. [[0.25, 0.5], [0.5, 0.25]].",
        )
        _require(len(self.select) >= 1, "pool.select is empty; name at least one score, e.g. contrast.")
        _require(
            len(set(self.select)) == len(self.select),
            f"pool.select = {list(self.select)} names a score twice; leave one out.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """The adapter and its training; the defaults are MI-TUNE's Table 8."""

    adapter: Literal["lora", "dora"] = "dora"
    rank: int = 32
    alpha: float = 32.0
    text_encoder: bool = False
    learning_rate: float = 1e-4
    warmup: int = 0  # iterations of linear warm-up, constant after
    weight_decay: float = 1e-2
    clip: float = 1.0
    batch_size: int = 400
    micro_batch_size: int | None = None  # None: the whole batch at once
    iterations: int = 300
    timesteps: tuple[float, float] = (0.5, 1.0)  # share of the noise schedule, 1 is pure noise: U(500, 1000)
    ema: float | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.timesteps
        _require(0 <= low < high <= 1, f"finetune.timesteps = {self.timesteps} must be a range within 0 and 1.")
        _require(self.rank >= 1, f"finetune.rank = {self.rank} must be at least 1.")
        _require(self.iterations >= 1, f"finetune.iterations = {self.iterations} must be at least 1.")
        _require(self.ema is None or 0 < self.ema < 1, f"finetune.ema = {self.ema} must lie between 0 and 1.")
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            f"finetune.micro_batch_size = {micro} must divide finetune.batch_size = {self.batch_size}.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How base and tuned are compared: the same prompts and the same seeds."""

    images: int = 4  # a prompt
    batch_size: int = 50
    seed: int = 1000
    guidance_scales: tuple[float, ...] = ()  # a sweep of the base model, beside the run's own scale

    def __post_init__(self) -> None:
        _require(self.images >= 1, f"eval.images = {self.images} must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run: prompts in, adapter and verdict out."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    prompts: str = "shapes:train"  # a text file, one prompt a line, or an embedded list
    eval_prompts: str | None = None  # None: no verdict
    rounds: int = 1  # R

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, f"rounds = {self.rounds} must be at least 1.")
