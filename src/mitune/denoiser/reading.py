"""What one call of a pipeline reads of a text, and what it would cut off.

Each pipeline has its own way from a text to its denoiser: cleaning, templates, tokenizers with limits of their own or
of the call, embeddings that are sliced. So the pipeline itself is asked: it runs up to its denoiser while its
tokenizers are watched, and what they hand on is compared with all the tokens of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mitune.denoiser.batches import Rows, called_through, joined
from mitune.denoiser.network import denoiser_of, free_denoiser
from mitune.denoiser.opening.calls import calling
from mitune.denoiser.opening.models import prompted
from mitune.denoiser.pipeline import Pipeline
from mitune.denoiser.quiet import quiet_pipelines
from mitune.errors import MituneError
from mitune.files.texts import Faults

TOGETHER = 32  # texts in one call


@dataclass(frozen=True, slots=True)
class Reading:
    """How many tokens a text has, with those that the pipeline puts before it, and how many are read at most."""

    tokens: int
    limit: int

    @property
    def is_cut(self) -> bool:
        return self.tokens > self.limit

    def __str__(self) -> str:
        return f"{self.tokens} tokens, but a call of this model reads {self.limit}; shorten the text"


def cut_texts(pipe: Pipeline, texts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Reading]:
    """Those of `texts` that `pipe(texts, **call)` would cut.

    Where several text encoders read a text, the one that reads most of it decides. Raises MituneError if the negative
    prompt of `call` is cut.
    """
    tokenizers = _tokenizers(pipe)
    if not tokenizers or not texts or "prompt_embeds" in call:
        return {}
    readings: dict[str, Reading] = {}
    distinct = list(dict.fromkeys(texts))
    with _up_to_the_denoiser(pipe, tokenizers) as ask:
        # What a template adds, of which the denoiser may get less; at the pipeline's own length, which has room for it.
        blank = ask([""], {name: value for name, value in call.items() if name != "max_sequence_length"})
        unread = max(0, blank.length - blank.embedded)
        for start in range(0, len(distinct), TOGETHER):
            chunk = distinct[start : start + TOGETHER]
            tokenization = ask(chunk, call)
            if (negative := tokenization.negative()).is_cut:
                raise MituneError(f"The negative_prompt in model.call has {negative}.")
            if tokenization.rows == len(chunk) and not tokenization.sliced(unread):
                readings |= zip(chunk, tokenization.readings(unread), strict=True)
            else:
                readings |= {text: ask([text], call).readings(unread)[0] for text in chunk}
    return {text: reading for text, reading in readings.items() if reading.is_cut}


def refuse_cut(pipe: Pipeline, texts: Sequence[str], call: Mapping[str, Any], source: str = "prompt") -> None:
    """Raises MituneError for texts that the pipeline's call would cut, with their numbers."""
    faults = Faults(source, " ")
    cut = cut_texts(pipe, texts, call)
    for number, text in enumerate(texts, start=1):
        if text in cut:
            faults.add(number, str(cut[text]))
    faults.refuse()


def _tokenizers(pipe: Pipeline) -> list[PreTrainedTokenizerBase]:
    """Each once, also those inside of processors."""
    parts = [getattr(part, "tokenizer", part) for part in pipe.components.values()]
    return list({id(part): part for part in parts if isinstance(part, PreTrainedTokenizerBase)}.values())


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """One call of a tokenizer: the tokens of each text, and the length of the rows that it gave for them."""

    texts: tuple[str, ...]
    tokens: list[int]
    closing: int  # the special tokens among them at the end, which truncation keeps
    length: int

    @property
    def excess(self) -> int:
        return max(self.tokens) - self.length


@dataclass(slots=True)
class _Tokenization:
    """One call of a pipeline: what each tokenizer did, the prompt first and then the negative prompt."""

    prompts: Sequence[str] = ()
    blank: frozenset[str] = frozenset()  # what tokenizers get where there is no prompt
    tokenized: dict[int, list[_Tokenized]] = field(default_factory=dict)  # by tokenizer; calls that truncate
    whole: set[int] = field(default_factory=set)  # the tokenizers that were called without truncation
    embedded: int = 0  # positions of the embeddings that the denoiser gets

    def note(self, tokenizer: Any, texts: Sequence[str], length: int | None, ids: Callable[[str], list[int]]) -> None:
        """A call of a tokenizer, which gave rows of `length` tokens, or does not truncate; `ids` is without limit."""
        if length is None:
            self.whole.add(id(tokenizer))
            return
        prompts = self.prompts if len(self.prompts) == len(texts) else [""] * len(texts)
        rows = [ids(_without_tail(text, prompt, self.blank)) for text, prompt in zip(texts, prompts, strict=True)]
        ends = tokenizer.eos_token_id, tokenizer.sep_token_id
        closing = sum(1 for _ in takewhile(ends.__contains__, reversed(rows[0])))
        noted = _Tokenized(tuple(texts), [len(row) for row in rows], closing, length)
        self.tokenized.setdefault(id(tokenizer), []).append(noted)

    @property
    def prompt(self) -> list[_Tokenized]:
        return [calls[0] for calls in self.tokenized.values()]

    @property
    def rows(self) -> int:
        """How many texts the tokenizers got in each call; 0 where they differ."""
        counts = {len(call.tokens) for call in self.prompt}
        return counts.pop() if len(counts) == 1 else 0

    @property
    def length(self) -> int:
        return min((call.length for call in self.prompt), default=0)

    def sliced(self, unread: int) -> int:
        """How many of the positions are cut off behind the tokenizer, as Qwen-Image does."""
        return max(0, self.length - self.embedded - unread) if self.embedded else 0

    def readings(self, unread: int) -> list[Reading]:
        """Of each text."""
        sliced = self.sliced(unread)
        by_tokenizer = [
            [Reading(n - call.closing if sliced else n, call.length - sliced) for n in call.tokens]
            for call in self.prompt
        ]
        return [self._best(readings) for readings in zip(*by_tokenizer, strict=True)] or [Reading(0, 0)]

    def negative(self) -> Reading:
        """Of the negative prompt, which is what the tokenizers get after the prompt."""
        further = [[call for call in calls if call.texts != calls[0].texts] for calls in self.tokenized.values()]
        longest = [max(calls, key=lambda call: call.excess) for calls in further if calls]
        return self._best([Reading(max(call.tokens), call.length) for call in longest])

    def _best(self, readings: Sequence[Reading]) -> Reading:
        if self.whole - set(self.tokenized):
            return Reading(0, 0)
        return max(readings, key=lambda each: (not each.is_cut, each.limit), default=Reading(0, 0))


def _without_tail(rendered: str, text: str, blank: Collection[str]) -> str:
    """A template around a text, up to the end of the text: what stands behind it may be cut without loss."""
    text = text.strip()
    end = len(rendered)
    while text and (start := rendered.rfind(text, 0, end)) >= 0:
        end = start + len(text)
        if rendered[:start] + rendered[end:] in blank:
            return rendered[:end]
        end -= 1
    return rendered


class _Reached(Exception):
    """The pipeline calls its denoiser; carries the arguments."""


@contextmanager
def _up_to_the_denoiser(
    pipe: Pipeline, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> Iterator[Callable[[Sequence[str], Mapping[str, Any]], _Tokenization]]:
    """Hands out a function of texts and a call that runs the pipeline up to its denoiser, and returns its tokenization.

    Text encoders do not run but for one row of each shape, as only the length of what they give matters.
    """
    tokenization, blank = _Tokenization(), frozenset[str]()

    def stop(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        raise _Reached(kwargs)

    def ask(texts: Sequence[str], call: Mapping[str, Any]) -> _Tokenization:
        nonlocal tokenization, blank
        tokenization = _Tokenization(texts, blank)
        generator = torch.Generator().manual_seed(0)  # else latents would be drawn from the global state
        with calling(pipe, call):
            try:
                pipe(**{**prompted(pipe, texts, call), "generator": generator, "output_type": "latent"})
            except _Reached as reached:
                states = reached.args[0].get("encoder_hidden_states")
                tokenization.embedded = states.shape[1] if isinstance(states, Tensor) and states.ndim == 3 else 0
        if not any(texts):
            blank = frozenset(
                text
                for calls in tokenization.tokenized.values()
                for tokenizer_call in calls
                for text in tokenizer_call.texts
            )
        return tokenization

    free_denoiser(pipe)
    with ExitStack() as stack:
        stack.callback(pipe.maybe_free_model_hooks)  # last, as it sets up the hooks of offloading anew
        stack.enter_context(quiet_pipelines())
        bars = getattr(pipe, "_progress_bar_config", {})
        stack.callback(setattr, pipe, "_progress_bar_config", bars)
        pipe.set_progress_bar_config(**{**bars, "disable": True})
        for tokenizer in tokenizers:
            stack.enter_context(_watched(tokenizer, lambda *noted: tokenization.note(*noted)))
        for part in pipe.components.values():
            if isinstance(part, PreTrainedModel):
                stack.enter_context(called_through(part, partial(_once_a_shape, {})))
        handle = denoiser_of(pipe).register_forward_pre_hook(stop, with_kwargs=True)
        stack.callback(handle.remove)
        yield ask


@contextmanager
def _watched(tokenizer: Any, note: Callable[..., None]) -> Iterator[None]:
    """Notes each call of a tokenizer. Python looks calls up in the class, so it gets one of its own for the time."""
    kind = type(tokenizer)

    def watched(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        encoded = kind.__call__(self, text, *args, **kwargs)
        ids = encoded["input_ids"]
        free = kwargs | {"truncation": False, "padding": False, "max_length": None, "return_tensors": None}
        note(
            self,
            [text] if isinstance(text, str) else text,
            len(ids if isinstance(ids[0], int) else ids[0]) if kwargs.get("truncation") else None,
            lambda rendered: kind.__call__(self, rendered, *args, **free, verbose=False)["input_ids"],
        )
        return encoded

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": watched})
    try:
        yield
    finally:
        tokenizer.__class__ = kind


def _once_a_shape(known: dict[Any, Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A text encoder's output for its first row, in all rows; made anew only where the shape is another."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor):
        return forward(*args, **kwargs)
    first = Rows(torch.tensor([0]), len(tokens))
    arguments = [first.of(value) for value in args], first.of(kwargs)
    shape = tuple(value.shape for value in (*arguments[0], *arguments[1].values()) if isinstance(value, Tensor))
    if shape not in known:
        known.clear()  # hidden states of all layers take much room
        known[shape] = forward(*arguments[0], **arguments[1])
    return joined([known[shape]] * len(tokens))
