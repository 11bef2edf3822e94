"""Inputs that a transformers model takes, made up from its configuration, and what it makes of them.

They are there to hold two states of one model against each other. transformers is not imported.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .untying import with_flags

__all__ = ["computes_the_same", "difference", "output_of", "sample_inputs"]

# Above that a forward on a CPU takes longer than what it would tell is worth.
_MOST_PARAMETERS = 4 * 10**9
_TOLERANCE = 1e-3


def sample_inputs(model: Any, n_tokens: int = 16) -> dict[str, Tensor] | None:
    """Random inputs for a model's forward, on the CPU, or None where what it takes is not known here.

    Tokens, pictures, sound and its spectra are known, of the sizes that the configuration says.
    """
    config = model.config
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    parameters = inspect.signature(type(model).forward).parameters
    decoder = "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", True)

    def ids(n_words: int) -> Tensor:
        return torch.randint(n_words, (1, n_tokens), generator=generator)

    inputs: dict[str, Tensor] = {}
    if main == "input_ids" and (n_words := getattr(text, "vocab_size", 0)):
        inputs["input_ids"] = ids(n_words)
    elif main == "pixel_values":
        vision: Any = next((part for part in _parts(config) if getattr(part, "image_size", None)), None)
        if vision is not None:
            size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else [vision.image_size] * 2
            shape = (1, getattr(vision, "num_channels", 3), *size)
            inputs["pixel_values"] = torch.randn(shape, generator=generator)
    elif main == "input_values":
        inputs["input_values"] = torch.randn((1, 4000), generator=generator)
    elif main == "input_features":
        bins = next((part.num_mel_bins for part in _parts(config) if getattr(part, "num_mel_bins", None)), None)
        if bins is not None:
            length = 2 * getattr(config, "max_source_positions", 100)
            # As Whisper's, or as everyone else's.
            shape = (1, bins, length) if hasattr(config, "max_source_positions") else (1, length, bins)
            inputs["input_features"] = torch.randn(shape, generator=generator)
    if not inputs:
        return None
    if decoder:
        words = getattr(config.get_text_config(decoder=True), "vocab_size", None) or getattr(text, "vocab_size", None)
        if not words:
            return None
        inputs["decoder_input_ids"] = ids(words)
    return inputs


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


@torch.no_grad()
def output_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The first floating-point tensor that a model returns (logits, or hidden states), as in evaluation."""
    training = [module for module in model.modules() if module.training]
    first = next(model.parameters())
    moved = {
        name: value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    model.eval()
    try:
        # Some draw random numbers in evaluation too, such as masks of pictures.
        with torch.random.fork_rng(devices=[first.device] if first.is_cuda else []):
            torch.manual_seed(0)
            output = model(**moved)
    finally:
        for module in training:
            module.training = True
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest finite value; equal infinities do not differ, and NaN gives NaN."""
    away = (found - expected).abs().masked_fill(found == expected, 0.0).max()
    largest = expected[expected.isfinite()].abs().max()
    return (away / largest).item() if away != 0 else 0.0


def computes_the_same(model: Any, paths: tuple[str, ...]) -> bool:
    """Whether a model computes the same if `tie_word_embeddings` becomes false in these of its configurations.

    True where that cannot be seen: a model that is too large, on meta, or whose inputs are not known.
    """
    parameters: list[nn.Parameter] = list(model.parameters())
    if any(p.is_meta for p in parameters) or sum(p.numel() for p in parameters) > _MOST_PARAMETERS:
        return True
    inputs = sample_inputs(model, n_tokens=4)
    if inputs is None:
        return True
    try:
        expected = output_of(model, inputs)
    except Exception:  # inputs that are made up: whatever a model says about them, it says nothing about the flag
        return True
    with with_flags(model.config, paths):
        found = output_of(model, inputs)
    return difference(found, expected) <= _TOLERANCE
