"""Inputs that a model's forward takes, found by the names of its parameters and by trying."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from small_models import VOCABULARY
from torch import Tensor

ROWS, LENGTH, IMAGE = 2, 8, 64

Inputs = dict[str, Any]


class NoInputs(Exception):
    """No inputs were found that the model takes; the message has the last error."""


def _all_configs(config: Any) -> list[Any]:
    found, left = [], [config]
    while left:
        entry = left.pop(0)
        found.append(entry)
        left += [value for value in vars(entry).values() if isinstance(value, transformers.PreTrainedConfig)]
    return found


def _field(config: Any, *names: str, default: Any = None) -> Any:
    for name in names:
        for entry in _all_configs(config):
            value = getattr(entry, name, None)
            if isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool):
                return value
    return default


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[-2]), int(value[-1])) if isinstance(value, (list, tuple)) and len(value) > 1 else (
        (int(value[0]),) * 2 if isinstance(value, (list, tuple)) else (int(value), int(value))
    )  # fmt: skip


def inputs_for(model: Any, attempt: Callable[[dict[str, Any]], None], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs that a model takes, as many of its kinds as can be found.

    Args:
        model: the model.
        attempt: runs the model; what it raises means that it does not take them.
        dtype: of pixels and the like.

    Raises:
        NoInputs: none was found.
    """
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(5)
    config = model.config

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def tokens(length: int = LENGTH) -> Tensor:
        limit = _field(config, "vocab_size", default=VOCABULARY)
        top = max(min(int(limit), VOCABULARY) - 45, 8)
        return torch.randint(6, top, (ROWS, length), generator=generator)

    error: Exception | None = None
    special = SPECIAL.get(type(model).__name__) or SPECIAL.get(config.model_type)
    candidates = special(model, random, tokens) if special else _candidates(model, parameters, random, tokens)
    for number, inputs in enumerate(itertools.islice(candidates, 60)):
        for _ in range(4):
            try:
                attempt(inputs)
                return inputs
            except Exception as failure:
                error = failure if number == 0 else error  # the likeliest inputs' error says most
                improved = _improved(inputs, failure, config, parameters, random, tokens)
                if improved is None:
                    break
                inputs = improved
    message = " ".join(str(error).split())
    raise NoInputs(f"{type(error).__name__}: {message}") from error


_MISMATCH = re.compile(r"tokens do not match[^0-9]*tokens: (\d+),?[^0-9]*features:? (\d+)")


def _improved(
    inputs: dict[str, Any], error: Exception, config: Any, parameters: Any, random: Any, tokens: Any
) -> Inputs | None:
    """Inputs changed by what the model has complained about, or None."""
    message = str(error)
    if found := _MISMATCH.search(message):
        kind = next((k for k in ("video", "image", "audio") if k in message.lower()), "image")
        token = _field(config, f"{kind}_token_id", f"{kind}_token_index", "media_token_id", "image_token_id")
        features = int(found[2])
        if features > 1000 * ROWS:  # some count numbers, not vectors
            features //= int(_field(config, "hidden_size", default=64))
        if token is None or "input_ids" not in inputs or not features or features % ROWS:
            return None
        ids = tokens()
        ids[ids == int(token)] = 6 if int(token) != 6 else 7
        ids = torch.cat([ids[:, :2], torch.full((ROWS, features // ROWS), int(token)), ids[:, 2:]], 1)
        changed = {**inputs, "input_ids": ids}
        is_token = (ids == int(token)).long()
        of_length = {"mm_token_type_ids": is_token, "token_type_ids": is_token, "attention_mask": torch.ones_like(ids)}
        changed |= {key: value for key, value in of_length.items() if key in inputs}
        return None if torch.equal(ids, inputs["input_ids"]) else changed
    return None


def _candidates(model: Any, parameters: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    """Inputs of a model by the names that its forward has, the likeliest first."""
    config = model.config
    if {"hidden_states", "grid_thw"} <= set(parameters):  # a vision tower on its own, with packed patches
        channels, patch = (
            int(_field(config, "in_channels", "num_channels", default=3)),
            _pair(_field(config, "patch_size")),
        )
        for times in dict.fromkeys((int(_field(config, "temporal_patch_size", "patch_temporal", default=1)), 1)):
            patches = random(ROWS * 16, channels * times * patch[0] * patch[1])
            for shaped in (patches, patches.unflatten(1, (channels * times, patch[0], patch[1]))):
                yield {"hidden_states": shaped, "grid_thw": torch.tensor([[1, 4, 4]] * ROWS)}
    if "target_sizes" in parameters and "input_ids" not in parameters:
        size = int(_field(config, "patch_size", default=8))
        sizes = torch.tensor([[4, 4]] * ROWS)
        yield {"pixel_values": random(1, 3, size, ROWS * 16 * size), "target_sizes": sizes}
    if {"audio_mel", "audio_mel_mask"} <= set(parameters):
        mels = int(_field(config, "input_feat_size", default=128))
        yield {"audio_mel": random(ROWS, 64, mels), "audio_mel_mask": torch.zeros(ROWS, 64, dtype=torch.bool)}
    if "pixel_position_ids" in parameters:
        positions = torch.tensor([[n % 4, n // 4] for n in range(16)]).repeat(ROWS, 1, 1)
        size = int(_field(config, "patch_size", default=8))
        yield {"pixel_values": random(ROWS, 16, 3 * size**2), "pixel_position_ids": positions}
    text: list[dict[str, Any]] = [{}]
    if "input_ids" in parameters:
        text = [{"input_ids": tokens()}]
        if "bbox" in parameters:
            box = torch.tensor([1, 2, 30, 40]).repeat(ROWS, LENGTH, 1)
            text = [{"input_ids": tokens(), "bbox": box}]
        if "qformer_input_ids" in parameters:
            text = [{"input_ids": tokens(), "qformer_input_ids": tokens()}]
        if "mm_token_type_ids" in parameters:
            text = [{**text[0], "mm_token_type_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long)}]
        text.append({**text[0], "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)})
        text.append({**text[1], "token_type_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long)})
    decoder: list[dict[str, Any]] = [{}]
    if "decoder_input_ids" in parameters:
        decoder = [{"decoder_input_ids": tokens()}, {}]
        books = _field(config, "num_codebooks", default=1)
        if books > 1:
            decoder.append({"decoder_input_ids": tokens().repeat(books, 1)})
    media: list[dict[str, Any]] = []
    for name, shapes in _media(config, parameters, random).items():
        media += [{name: shape} if isinstance(shape, Tensor) else shape for shape in shapes]
    media = media or [{}]
    if media != [{}] and "input_ids" in parameters and "decoder_input_ids" not in parameters:
        media = [*media, {}]
    if not any(text[0]):
        text = [{}]
    for some in media:
        for more, last in itertools.product(text, decoder):
            yield {**more, **some, **last}
    if text != [{}]:
        for some in media:
            for last in decoder:
                yield {**some, **last}


def _media(config: Any, parameters: Any, random: Any) -> dict[str, list[Any]]:
    """Input name → shapes to try, as tensors, or as several inputs together."""
    found: dict[str, list[Any]] = {}
    channels = int(_field(config, "num_channels", "in_channels", "in_chans", default=3) if not isinstance(
        _field(config, "num_channels", "in_channels", "in_chans", default=3), (list, tuple)) else 3)  # fmt: skip
    height, width = _pair(_field(config, "image_size", "img_size", "input_size", default=IMAGE))
    if height < 8:
        height = width = IMAGE
    frames = int(_field(config, "num_frames", "frames_per_clip", default=2) or 2)
    for name in ("pixel_values", "images", "image", "pixel_values_images"):
        if name not in parameters:
            continue
        found[name] = [
            random(ROWS, channels, height, width),
            random(ROWS, frames, channels, height, width),
            random(ROWS, 1, channels, height, width),
        ]
        grid = next(
            (
                g
                for g in ("image_grid_thw", "grid_thw", "image_grid_hws", "image_sizes", "spatial_shapes")
                if g in parameters
            ),
            None,
        )
        if grid in ("image_grid_thw", "grid_thw"):
            patch = int(_field(config, "patch_size", default=8))
            times = _field(config, "temporal_patch_size", "patch_temporal", default=1)
            merge_sizes = {"image_merge_sizes", "merge_sizes"} & set(parameters)
            for t in (times, 1):
                found[name].insert(
                    0,
                    {
                        name: random(ROWS * 16, channels * int(t) * patch * patch),
                        grid: torch.tensor([[1, 4, 4]] * ROWS),
                        **{key: torch.tensor([1] * ROWS) for key in merge_sizes},
                    },
                )
        elif grid == "image_sizes":
            sizes = torch.tensor([[height, width]] * ROWS)
            shapes = ((ROWS, channels, height, width), (ROWS, 2, channels, height, width))
            found[name] = [found[name][0], *({name: random(*shape), grid: sizes} for shape in shapes), *found[name][1:]]
        elif grid == "spatial_shapes":
            patch = int(_field(config, "patch_size", default=8))
            found[name].insert(0, {
                name: random(ROWS, 16, channels * patch * patch),
                "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
                grid: torch.tensor([[4, 4]] * ROWS),
            })  # fmt: skip
    for name in ("pixel_values_videos", "video"):
        if name in parameters and "pixel_values" not in parameters:
            found[name] = [random(ROWS, frames, channels, height, width)]
    mels = int(
        _field(
            config,
            "feature_projection_input_dim",
            "input_dim",
            "num_mel_bins",
            "feature_size",
            "input_feat_per_channel",
            "n_mel_bins",
            "input_feat_size",
            default=80,
        )
    )
    for name in ("input_features", "audio_features"):
        if name in parameters:
            length = 2 * int(_field(config, "max_source_positions", default=32))
            found[name] = [
                random(ROWS, length, mels),
                random(ROWS, mels, length),
                {name: random(ROWS, length, mels), "input_features_mask": torch.ones(ROWS, length, dtype=torch.bool)},
                {name: random(ROWS, mels, length), "input_features_mask": torch.ones(ROWS, length, dtype=torch.long)},
                {name: random(ROWS, length, mels), "attention_mask": torch.ones(ROWS, length, dtype=torch.long)},
                {name: random(ROWS, mels, length), "attention_mask": torch.ones(ROWS, length, dtype=torch.long)},
                random(ROWS, 1, length, mels),
                random(ROWS, 1, 1024, 64),
                random(ROWS, 16, int(_field(config, "num_chroma", default=12))),
            ]
            found[name] = [e for e in found[name] if isinstance(e, Tensor) or set(e) <= set(parameters)]
    if "input_values" in parameters:
        audio = int(_field(config, "audio_channels", default=1))
        found["input_values"] = [
            random(ROWS, 1600),
            random(ROWS, audio, 1600),
            random(ROWS, 64, mels),
            random(ROWS, int(_field(config, "max_length", default=64) or 64), mels),
        ]
    if "spectrogram" in parameters:
        found["spectrogram"] = [random(ROWS, 32, int(_field(config, "model_in_dim", "num_mel_bins", default=80)))]
    for name in ("past_values", "inputs"):
        if name in parameters:
            length = int(_field(config, "context_length", default=32))
            found[name] = [
                random(ROWS, length, int(_field(config, "num_input_channels", default=1))),
                random(ROWS, length),
            ]
    return found


def _books(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    """A token for each codebook and row."""
    books = int(_field(model.config, "num_codebooks", default=4))
    yield {"input_ids": tokens().repeat_interleave(books, 0)}
    yield {"input_ids": tokens().unsqueeze(-1).repeat(1, 1, books)}
    yield {"input_ids": tokens().unsqueeze(1).repeat(1, books, 1)}


def _flattened_patches(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    width = 2 + 3 * int(_field(model.config, "patch_size", default=16)) ** 2
    patches = random(ROWS, 12, width)
    patches[..., :2] = torch.tensor([[1 + n // 4, 1 + n % 4] for n in range(12)])
    yield {"flattened_patches": patches, "decoder_input_ids": tokens()}
    yield {"flattened_patches": patches}


def _clips(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    size = int(_field(model.config, "image_size", default=IMAGE))
    yield {"pixel_values": random(ROWS, 2, 3, size, size), "input_ids": tokens(), "qformer_input_ids": tokens()}


def _series(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    config = model.config
    length = config.context_length + max(config.lags_sequence)
    past = {
        "past_values": random(ROWS, length),
        "past_time_features": random(ROWS, length, max(config.num_time_features, 0)),
        "past_observed_mask": torch.ones(ROWS, length),
    }
    future = {
        "future_values": random(ROWS, config.prediction_length),
        "future_time_features": random(ROWS, config.prediction_length, max(config.num_time_features, 0)),
    }
    yield {**past, **future}


def _spectrogram(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {"input_ids": tokens(), "decoder_input_values": random(ROWS, 6, model.config.num_mel_bins)}


def _robot(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    config = model.config
    size = int(_field(config, "image_size", default=IMAGE))
    image = int(_field(config, "image_token_id", "image_token_index", default=VOCABULARY - 1))
    for count in (64, 16, 4):
        ids = torch.cat([torch.full((ROWS, count), image), tokens()], 1)
        yield {
            "state": random(ROWS, config.max_state_dim),
            "noise": random(ROWS, config.chunk_size, config.max_action_dim),
            "timestep": torch.full((ROWS,), 0.5),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": random(ROWS, 1, 3, size, size),
            "pixel_attention_mask": torch.ones(ROWS, 1, dtype=torch.bool),
        }


def _queries(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {
        "query_embeds": random(ROWS, 8, model.config.hidden_size),
        "encoder_hidden_states": random(ROWS, 6, model.config.encoder_hidden_size),
    }
    yield {"query_embeds": random(ROWS, 8, model.config.hidden_size)}


def _questions(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {
        "input_ids": tokens()[:1], "marks": torch.tensor([[3, 5]]), "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    }  # fmt: skip


def _decisions(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    config = model.config
    yield {
        "states": random(ROWS, 6, config.state_dim), "actions": random(ROWS, 6, config.act_dim),
        "rewards": random(ROWS, 6, 1), "returns_to_go": random(ROWS, 6, 1),
        "timesteps": torch.arange(6).repeat(ROWS, 1), "attention_mask": torch.ones(ROWS, 6, dtype=torch.long),
    }  # fmt: skip


def _spectrogram_and_text(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    audio = {"input_features": random(ROWS, 1, 1001, 64), "is_longer": torch.tensor([[False]] * ROWS)}
    yield {"input_ids": tokens(), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long), **audio}


def _waveform(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {"input_values": random(ROWS, 1, 3200), "padding_mask": torch.ones(ROWS, 3200, dtype=torch.bool)}


def _large_image(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {"pixel_values": random(ROWS, 3, 256, 256)}


def _tiles(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    vision = model.config.vision_config
    tiles, size = vision.max_num_tiles, vision.image_size
    ids = tokens()
    ids[:, 0] = model.config.image_token_index
    yield {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": random(ROWS, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (tiles - 1)]] * ROWS),
        "cross_attention_mask": torch.tensor([[1] + [0] * (tiles - 1)]).repeat(ROWS, LENGTH, 1, 1),
    }
    yield {"input_ids": tokens()}


def _task(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    length = int(_field(model.config, "task_seq_len", default=77))
    yield {"pixel_values": random(ROWS, 3, IMAGE, IMAGE), "task_inputs": tokens(length)}


def _interleaved(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    size = model.config.vision_config.image_size
    ids = tokens()
    yield {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": random(ROWS, 1, 3, size, size),
        "image_attention_mask": torch.ones(ROWS, LENGTH, 1, dtype=torch.long),
    }


def _regions(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    features = {"visual_feats": random(ROWS, 4, model.config.visual_feat_dim), "visual_pos": random(ROWS, 4, 4)}
    yield {"input_ids": tokens(), **features}


def _line(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    yield {"pixel_values": random(ROWS, 3, 48, 320)}


def _pairs(model: Any, random: Any, tokens: Any) -> Iterator[Inputs]:
    for channels in (3, 1):
        yield {"pixel_values": random(ROWS, 2, channels, 64, 64)}


# Model type or class → its inputs, where the names in its forward do not tell.
SPECIAL: dict[str, Callable[..., Any]] = {
    "MusicgenForCausalLM": _books,
    "MusicgenMelodyForCausalLM": _books,
    "pix2struct": _flattened_patches,
    "pix2struct_vision_model": _flattened_patches,
    "instructblipvideo": _clips,
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "SpeechT5ForTextToSpeech": _spectrogram,
    "PI0ForConditionalGeneration": _robot,
    "blip_2_qformer": _queries,
    "jev": _questions,
    **dict.fromkeys(("pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec", "pp_ocrv6_medium_rec", "pp_ocrv6_small_rec"), _line),
    "DecisionTransformerModel": _decisions,
    "clap": _spectrogram_and_text,
    "encodec": _waveform,
    "MllamaForConditionalGeneration": _tiles,
    "lxmert": _regions,
    "IdeficsForVisionText2Text": _interleaved,
    "OneFormerForUniversalSegmentation": _task,
    "depth_pro": _large_image,
    "lightglue": _pairs,
    "superglue": _pairs,
    "efficientloftr": _pairs,
}
