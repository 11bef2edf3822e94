"""Inputs that a transformers model takes, made up from its configuration, and what it makes of them.

They are there to hold two states of one model against each other. transformers is not imported.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .untying import with_flags

__all__ = ["computes_the_same", "difference", "first_output", "output_of", "sample_inputs"]

# Above that a forward on a CPU takes longer than what it would tell is worth.
_MOST_PARAMETERS = 4 * 10**9
_TOLERANCE = 1e-3


def sample_inputs(model: Any, n_tokens: int = 16) -> list[dict[str, Tensor]]:
    """Random inputs for a model's forward, on the CPU, the likeliest first; none where what it takes is not known here.

    Tokens, pictures, sound and its spectra are known, of the sizes that the configuration says: what the model calls
    its main input, and all of them that its forward has a name for.
    """
    config = model.config
    parameters = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(0)

    def ids(**which: bool) -> Tensor | None:
        n_words = getattr(_text_config(config, **which), "vocab_size", None) or getattr(config, "vocab_size", None)
        return torch.randint(n_words, (1, n_tokens), generator=generator) if n_words else None

    made = {
        "input_ids": ids(),
        "pixel_values": _picture(config, generator),
        "input_values": torch.randn((1, 4000), generator=generator),
        "input_features": _spectra(config, generator),
    }
    known = {name: value for name, value in made.items() if value is not None}
    beside = {}
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", True):
        words = ids(decoder=True)
        if words is None:
            return []
        beside = {"decoder_input_ids": words}
    main = getattr(model, "main_input_name", "input_ids")
    first = {name: value for name, value in known.items() if name == main}
    whole = {name: value for name, value in known.items() if name in parameters}
    return [inputs | beside for inputs in (first, whole if whole.keys() != first.keys() else {}) if inputs]


def _text_config(config: Any, **which: bool) -> Any:
    """The part of a configuration that tells of words; None where several do."""
    try:
        return config.get_text_config(**which)
    except ValueError:
        return None


def _picture(config: Any, generator: torch.Generator) -> Tensor | None:
    parts = [part for part in _parts(config) if getattr(part, "image_size", None) or hasattr(part, "num_channels")]
    if not parts:
        return None
    vision: Any = next((part for part in parts if getattr(part, "image_size", None)), parts[0])
    # Without a size of their own they are convolutional, and take any.
    size = getattr(vision, "image_size", None) or 224
    return torch.randn(
        (1, getattr(vision, "num_channels", 3), *(size if isinstance(size, (list, tuple)) else [size] * 2)),
        generator=generator,
    )


def _spectra(config: Any, generator: torch.Generator) -> Tensor | None:
    names = ("num_mel_bins", "input_feat_per_channel")
    bins = next((getattr(part, name) for part in _parts(config) for name in names if getattr(part, name, None)), None)
    if bins is None:
        return None
    # As Whisper's, or as everyone else's.
    is_whispers = hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins")
    length = 2 * config.max_source_positions if is_whispers else 200
    return torch.randn((1, bins, length) if is_whispers else (1, length, bins), generator=generator)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def first_output(model: Any, choices: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """The first of these inputs that a model takes, and `output_of` them.

    Raises:
        Exception: what the model says about the first of them, if it takes none.
    """
    errors: list[Exception] = []
    for inputs in choices:
        try:
            return inputs, output_of(model, inputs)
        except Exception as error:  # whatever a model says about inputs that are made up
            errors.append(error)
    raise errors[0]


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
    choices = sample_inputs(model, n_tokens=4)
    if not choices:
        return True
    try:
        inputs, expected = first_output(model, choices)
    except Exception:  # inputs that are made up: whatever a model says about them, it says nothing about the flag
        return True
    with with_flags(model.config, paths):
        found = output_of(model, inputs)
    return difference(found, expected) <= _TOLERANCE
