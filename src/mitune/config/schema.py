"""Every setting of a run, as frozen dataclasses: a default lives here once and is checked when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from mitune.config.ranges import Range, settle
from mitune.errors import MituneError

# The upper ends are far above any use; beyond them lies a slip of the pen.
Count = Annotated[int, Range(least=1, most=10_000_000)]
SmallCount = Annotated[int, Range(least=1, most=65_536)]
Seed = Annotated[int, Range(least=0, most=2**63 - 1)]  # as torch's generators take them
Share = Annotated[float, Range(least=0, most=1)]
ProperShare = Annotated[float, Range(above=0, below=1)]
GuidanceScale = Annotated[
    float,
    Range(
        above=1,
        most=1000,
        why="at 1 or below, pipelines skip the pass without the prompt, and mutual information needs both",
    ),
]
Rungs = tuple[tuple[ProperShare, ProperShare], ...]
RaceSetting = Literal["auto", "off"] | Rungs
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
    guidance_scale: GuidanceScale | None = None
    steps: Annotated[int, Range(least=2, most=10_000)] | None = None
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call, e.g. height
    # In place of the pipeline's own: name, a class of diffusers, and its options; e.g. {name: DDIMScheduler,
    # timestep_spacing: trailing}, or --set model.scheduler.name=DDIMScheduler. Without a name, options of its own one.
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self, "model")
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
            not (self.compile and self.offload == "sequential"),
            "model.compile needs the denoiser in one piece; set model.offload to model or none, or compile to false.",
        )

    @property
    def is_single_file(self) -> bool:
        """Whether all weights are in one file, as other programs keep them."""
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How many candidates a prompt gets, and which stay (Algorithm 1 of MI-TUNE)."""

    candidates: Annotated[int, Range(least=1, most=100_000)] = 50  # M
    keep: Count = 1  # k
    select: tuple[str, ...] = ("contrast",)  # scores or controls; each makes a set of its own
    batch_size: SmallCount | None = None  # candidates in one call of the denoiser; None: as many as fit
    # Rungs of a race: after this share of the steps, this share of a prompt's candidates stays, by the scores of
    # `select`. "auto": GRADUAL where these all begin with self-confidence, else "off", no race.
    race: RaceSetting = "auto"
    # Hard negatives, for scores that hold an image against rival prompts: JSON lines, {"prompt": ..., "negatives":
    # [...]}, or a world of one's own, mine:world. None, and for prompts that these lack: those that rules make.
    negatives: str | None = None
    # For objectives that learn from what is wrong as well, a ranked set: so many of a prompt's best and of its worst by
    # the score; all candidates if there are no more. None: all if finetune.objective needs a ranked set, else none.
    ranked: Count | None = None
    # For objectives that hold an image against rival prompts: the sets have the hard negatives of each prompt.
    rivals: bool = False
    # Who gives the scores that ask a model again, where an adapter made the candidates: the base without it, whose
    # judgment no round changes, or the present model with it.
    scored_by: Literal["base", "present"] = "base"
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self, "pool")
        _require(
            1 <= self.keep <= self.candidates,
            f"pool.keep = {self.keep} must lie between 1 and pool.candidates = {self.candidates}.",
        )
        rungs = () if isinstance(self.race, str) else self.race
        _require(
            (len(rungs) > 0 or isinstance(self.race, str))
            and all(a < c and b > d for (a, b), (c, d) in pairwise(rungs)),
            f"pool.race = {[list(rung) for rung in rungs]} must be a list of [share of the steps, share of the "
            "candidates that stays], the first rising and the second falling, e.g. [[0.25, 0.5], [0.5, 0.25]]; or "
            "auto, or off.",
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
    objective: str = "denoising"  # what it is trained towards: a name of `mitune list objectives`, or module:attribute
    rank: Count = 32
    alpha: Annotated[float, Range(above=0, most=1e6)] = 32.0
    text_encoder: bool = False
    learning_rate: Annotated[float, Range(least=1e-10, most=1)] = 1e-4
    warmup: Annotated[int, Range(least=0, most=10_000_000)] = 0  # iterations of linear warm-up, constant after
    weight_decay: Share = 1e-2
    clip: Annotated[float, Range(above=0, most=1e6)] = 1.0  # the gradient's largest norm
    batch_size: SmallCount = 400
    micro_batch_size: SmallCount | None = None  # None: the whole batch at once
    iterations: Count = 300
    timesteps: tuple[Share, Share] = (0.5, 1.0)  # share of the noise schedule, 1 is pure noise: U(500, 1000)
    ema: ProperShare | None = None
    precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoint_every: Count = 50
    seed: Seed = 0

    def __post_init__(self) -> None:
        settle(self, "finetune")
        low, high = self.timesteps
        _require(low < high, f"finetune.timesteps = {list(self.timesteps)} must be a range, the lower end first.")
        micro = self.micro_batch_size
        _require(
            micro is None or self.batch_size % micro == 0,
            f"finetune.micro_batch_size = {micro} must divide finetune.batch_size = {self.batch_size}.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How base and tuned are compared: the same prompts and the same seeds."""

    images: Annotated[int, Range(least=1, most=100_000)] = 4  # a prompt
    batch_size: SmallCount = 50
    seed: Seed = 1000
    each_round: bool = False  # also the adapters of the rounds before the last
    guidance_scales: tuple[GuidanceScale, ...] = ()  # a sweep of the base model, beside the run's own scale

    def __post_init__(self) -> None:
        settle(self, "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run: prompts in, adapter and verdict out."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    prompts: str = "shapes:train"  # a text file, one prompt a line, JSON lines, a table, or an embedded list
    eval_prompts: str | None = None  # None: no verdict
    metric: str | None = None  # judges images, by name or module:attribute; None: what comes with prompts or model
    prompt_field: str | None = None  # JSON field or column of these files that holds the prompts; None: a guess
    method: str = "mi-tune"  # what makes the variants to judge: a name of `mitune list methods`, or module:attribute
    rounds: Annotated[int, Range(least=1, most=1000)] = 1  # R
    round_prompts: Count | None = None  # how many of the prompts each round takes, all in turn, shuffled; None: all

    def __post_init__(self) -> None:
        settle(self, "")
