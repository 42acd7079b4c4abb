"""Latents to pictures and back, by whatever the pipeline itself does around its autoencoder.

Pipelines unpack, scale, shift, normalize, lift the autoencoder to float32, check and mark the picture, each in its own
way. None of that is repeated here. To decode, the pipeline is called with nothing in place of its network, and with a
scheduler whose steps end in the given latents. To encode, such a call is watched: what the autoencoder is handed for
latents that are known says how they are laid out, and that is turned round.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image
from torch import Generator, Tensor, nn

from mitune.denoiser.batches import called_through, texts_encoded_once
from mitune.denoiser.latent_map import PROBES, LatentMap, probes
from mitune.denoiser.network import denoiser_of, execution_device, free_denoiser
from mitune.denoiser.opening.calls import calling
from mitune.denoiser.opening.models import Model, prompted
from mitune.denoiser.pipeline import Autoencoder, DenoiserModule, Pipeline, Scheduler
from mitune.denoiser.quiet import quiet_pipelines
from mitune.errors import MituneError, ModelError
from mitune.files.images import as_shown

log = logging.getLogger(__name__)
AT_ONCE = 2**16  # pixels in one call of the autoencoder, whose activations take a kilobyte or more each


def check_pictures(model: Model) -> None:
    """Raises ModelError, as `decode` would after the sampling, if the pipeline does not make its latents pictures."""
    texts: dict[Any, Any] = {}
    ended: list[Tensor] = []

    def noise(latents: Tensor) -> Tensor:
        ended[:] = [torch.randn(latents.shape, generator=Generator().manual_seed(0)).to(latents)]
        return ended[0]

    pipe, call = model.pipe, model.call
    with calling(pipe, call), np.errstate(invalid="ignore"):  # in half precision, noise may overflow the autoencoder
        returned = _call_to_end(pipe, noise, 1, call | {"output_type": "latent"}, texts)
        _require_unchanged(pipe, returned, ended[0])
        _require_pictures(pipe, _call_to_end(pipe, noise, 1, call | {"output_type": "pil"}, texts))


def decode(model: Model, latents: Tensor) -> Iterator[Image.Image]:
    """The pipeline's own pictures of latents (N, ...) as its denoiser sees them; a few at once, to bound the memory.

    Says how many come out broken because the autoencoder overflows. Raises ModelError if the pipeline makes no
    pictures, or changes its latents after the last step, and MituneError for latents of another size than
    `model.call` makes.
    """
    pipe, broken = model.pipe, 0
    if not len(latents):
        return
    texts: dict[Any, Any] = {}
    returned = _call_to_end(pipe, latents[:1].to, 1, model.call | {"output_type": "latent"}, texts)
    _require_unchanged(pipe, returned, latents[:1])
    for chunk in torch.split(latents, _decoded_at_once(pipe, latents)):
        with _broken_counted(pipe) as overflown, np.errstate(invalid="ignore"):  # numpy warns of NaN
            images = _call_to_end(pipe, chunk.to, len(chunk), model.call | {"output_type": "pil"}, texts)
        broken += sum(overflown)
        _require_pictures(pipe, images)
        yield from images
    if broken:
        message = "%d of %d pictures came out broken, as the autoencoder overflows in %s; set model.dtype to float32."
        log.warning(message, broken, len(latents), str(pipe.dtype).removeprefix("torch."))


def _require_unchanged(pipe: Pipeline, returned: Tensor, ended: Tensor) -> None:
    """Whether what the pipeline returns as latents is what its last step ended in."""
    if returned.shape != ended.shape or not torch.equal(returned, ended.to(returned)):
        raise ModelError(
            f"{type(pipe).__name__} changes its latents after the last step in a way that mitune does not know, so it "
            "cannot make pictures of them; please report this kind of model."
        )


def _require_pictures(pipe: Pipeline, images: Any) -> None:
    if not all(isinstance(image, Image.Image) for image in images):
        raise ModelError(
            f"{type(pipe).__name__} makes no pictures; take a text-to-image model, or score its latents in Python."
        )


def _decoded_at_once(pipe: Pipeline, latents: Tensor) -> int:
    cells = 4 * latents.shape[1] if latents.ndim == 3 else latents.shape[2:].numel()  # a packed token is 2 × 2 of them
    return max(1, AT_ONCE // (cells * getattr(pipe, "vae_scale_factor", 8) ** 2))


@contextmanager
def _broken_counted(pipe: Pipeline) -> Iterator[list[int]]:
    """Hands out a list that gets the number of pictures that are not finite from each call of the decoder."""
    broken: list[int] = []

    def counted(decode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = decode(*args, **kwargs)
        broken.append(int((~output[0].isfinite().flatten(1).all(dim=1)).sum()))
        return output

    autoencoder = _autoencoder_of(pipe)
    with called_through(autoencoder, counted, "decode") if autoencoder else nullcontext():
        yield broken


@torch.no_grad()
def encode_images(pipe: Pipeline, images: Sequence[Image.Image], call: Mapping[str, Any] | None = None) -> Tensor:
    """Pictures of one size as latents (N, ...) the way the pipeline's denoiser sees them: the autoencoder's mode.

    The autoencoder is lifted to float32, as those of half precision may overflow. call: the arguments that the
    pipeline is used with. Raises MituneError for pictures that differ in size or have one that the pipeline does not
    make, and ModelError for a pipeline that has no autoencoder of pictures, or a way to it that cannot be turned round.
    """
    images = [as_shown(image) for image in images]
    if len({image.size for image in images}) != 1:
        raise MituneError("The images differ in size; score those of one size together.")
    autoencoder, name = _autoencoder_of(pipe), type(pipe).__name__
    if autoencoder is None or not hasattr(pipe, "image_processor"):
        raise ModelError(f"{name} has no autoencoder that reads pictures; give latents as its denoiser sees them.")
    pixels = pipe.image_processor.preprocess(images)
    height, width = pixels.shape[-2:]
    with quiet_pipelines(), _in_float32(autoencoder):
        mapping = _map_of(pipe, autoencoder, call or {}, height, width)
        if len(mapping.shape) == 4:
            pixels = pixels.unsqueeze(2)  # an autoencoder of films, which takes a picture for one of one frame
        chunks = [
            _encoded(autoencoder, chunk.to(execution_device(pipe), torch.float32))
            for chunk in pixels.split(max(1, AT_ONCE // (height * width)))
        ]
    encoded = torch.cat(chunks)
    if encoded.shape[1:] != mapping.shape:
        raise MituneError(
            f"{name} makes {width} × {height} pixels of latents {tuple(mapping.shape)}, but its autoencoder makes "
            f"{tuple(encoded.shape[1:])} of them; give pictures of a size that it makes."
        )
    return mapping.latents(encoded)


def are_packed(pipe: Pipeline, latents: Tensor) -> bool:
    """Whether these latents are tokens, (N, S, C). Raises MituneError for latents in a shape that a denoiser of
    pictures does not take."""
    packs = hasattr(pipe, "_pack_latents")
    if hasattr(pipe, "image_processor") and latents.ndim != (3 if packs else 4):
        wanted = "packed, (N, S, C)" if packs else "(N, C, H, W), not packed"
        raise MituneError(f"The latents have shape {tuple(latents.shape)}; this model takes {wanted}.")
    return packs and latents.ndim == 3


def _encoded(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """The mode of the encoder's distribution, or what it gives if that is none (TAESD, DC-AE, VQ)."""
    encoded = autoencoder.encode(pixels, return_dict=False)[0]
    latents: Tensor = encoded if isinstance(encoded, Tensor) else encoded.mode()
    return latents


@contextmanager
def _in_float32(autoencoder: Autoencoder) -> Iterator[None]:
    dtype = autoencoder.dtype
    if dtype == torch.float32:
        yield
        return
    autoencoder.to(torch.float32)
    try:
        yield
    finally:
        autoencoder.to(dtype)


class _Stop(Exception):
    """Leaves a call of the pipeline where it would decode."""


def _map_of(pipe: Pipeline, autoencoder: Autoencoder, call: Mapping[str, Any], height: int, width: int) -> LatentMap:
    """What the pipeline does to the latents of pictures of this size before it decodes them."""
    ends: list[Tensor] = []

    def known(latents: Tensor) -> Tensor:
        ends[:] = [probes(latents)]
        return ends[0]

    def stop(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ends.append(next(iter([*args, *kwargs.values()])))
        raise _Stop

    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted = {"height": height, "width": width, "use_resolution_binning": False}
    arguments = {**call, **{name: value for name, value in wanted.items() if name in accepted}, "output_type": "pil"}
    name = type(pipe).__name__
    try:
        with called_through(autoencoder, stop, "decode"), suppress(_Stop):
            _call_to_end(pipe, known, PROBES, arguments, {})
    except ValueError as error:
        raise MituneError(f"{name} makes no pictures of {width} × {height} pixels ({error}).") from error
    mapping = LatentMap.between(*ends) if len(ends) == 2 else None
    if mapping is None:
        raise ModelError(
            f"{name} does more to its latents than to order, scale and shift them, before it decodes them; give "
            "latents as its denoiser sees them in place of pictures."
        )
    return mapping


def _autoencoder_of(pipe: Pipeline) -> Autoencoder | None:
    """Whatever the pipeline calls it: vae, vqvae, movq, vqgan."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    autoencoder = next((part for part in parts if hasattr(part, "encode") and hasattr(part, "decode")), None)
    return cast(Autoencoder | None, autoencoder)


@torch.no_grad()
def _call_to_end(
    pipe: Pipeline, ending: Callable[[Tensor], Tensor], rows: int, call: Mapping[str, Any], texts: dict[Any, Any]
) -> Any:
    """What the pipeline makes of `rows` blank prompts if each of its steps ends in `ending`, called with the latents
    that it would have ended in; the network is not run. texts: kept for further calls."""
    arguments = prompted(pipe, [""] * rows, {**call, "num_inference_steps": 2})  # of one, PixArt makes another path
    free_denoiser(pipe)
    denoiser, scheduler = denoiser_of(pipe), pipe.scheduler
    with called_through(denoiser, _no_network(denoiser)), texts_encoded_once(pipe, texts), quiet_pipelines():
        pipe.scheduler = _ending_in(scheduler, ending, type(pipe).__name__)
        try:
            return pipe(generator=[Generator().manual_seed(0) for _ in range(rows)], **arguments)[0]
        finally:
            pipe.scheduler = scheduler


def _no_network(denoiser: DenoiserModule) -> Callable[..., Any]:
    """What stands in for the network's forward: zeros, of as many channels, some of which may be a variance."""
    first = next(iter(inspect.signature(denoiser.forward).parameters))
    channels = getattr(denoiser.config, "out_channels", None)

    def zeros(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        noisy = args[0] if args else kwargs[first]
        if isinstance(noisy, list):
            output: Any = [torch.zeros_like(row) for row in noisy]
        elif noisy.ndim == 4 and isinstance(channels, int):
            output = noisy.new_zeros(len(noisy), channels, *noisy.shape[2:])
        else:
            output = torch.zeros_like(noisy)
        return (output,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(sample=output)

    return zeros


def _ending_in(scheduler: Scheduler, ending: Callable[[Tensor], Tensor], name: str) -> Scheduler:
    """A copy of the scheduler whose steps end in `ending`, called with the latents that they would end in."""
    stand_in = copy.copy(scheduler)
    step = MethodType(type(scheduler).step, stand_in)  # of the copy, whatever watches the one that it is of

    def end(latents: Tensor) -> Tensor:
        ended = ending(latents)
        if ended.shape != latents.shape:
            raise MituneError(
                f"{name} samples latents of shape {tuple(latents.shape)}, but these have {tuple(ended.shape)}; set "
                "model.call to the arguments (height, width) that they were made with."
            )
        return ended

    @functools.wraps(step)  # pipelines ask it whether it takes a generator
    def ended(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(step).bind(*args, **kwargs)
        predicted, latents = bound.arguments["model_output"], bound.arguments["sample"]
        if predicted.shape[1] not in (latents.shape[1], 2 * latents.shape[1]):  # the pipeline has cut zeros too short
            bound.arguments["model_output"] = torch.zeros_like(latents, dtype=predicted.dtype)
        output = step(*bound.args, **bound.kwargs)
        if isinstance(output, tuple):
            return (end(output[0]), *output[1:])
        output.prev_sample = end(output.prev_sample)
        return output

    stand_in.step = ended
    return stand_in
