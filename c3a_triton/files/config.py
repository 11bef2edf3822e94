"""The configuration of one adapter: PEFT's field names, checked when it is built, in PEFT's JSON on disk."""

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from c3a_triton._public import public
from c3a_triton.errors import CheckpointError, ConfigError

from .atomic import replace_file
from .expressions import check_sizes, compile_pattern
from .values import described, is_positive_int, plain, shown, some

__all__ = [
    "BLOCK_SIZE_KEY_FORM",
    "CONFIG_NAME",
    "DEFAULT_TARGET_MODULES",
    "LAYERS_PATTERN_FORM",
    "MAX_CONFIG_BYTES",
    "MODEL_CONFIG_NAME",
    "MODULES_TO_SAVE_FORM",
    "C3AConfig",
    "read_config_file",
    "with_owners",
]

CONFIG_NAME = "adapter_config.json"
MODEL_CONFIG_NAME = "config.json"
PEFT_TYPE = "C3A"
# A configuration is a few kilobytes; one that lists every module of a large model is a few megabytes.
MAX_CONFIG_BYTES = 16 * 2**20
MAX_NAMES = 65536

INIT_WEIGHTS = ("gaussian", "kaiming_uniform", "xavier_uniform")
BIASES = ("none", "all", "c3a_only")

# How a user's pattern is completed before it is matched. The first is this library's rule for `block_size_pattern`; the
# others are PEFT's rules, and to be matched from the start of the module's name, as `re.match` does.
BLOCK_SIZE_KEY_FORM = r"(?:.*\.)?(?:{})"
MODULES_TO_SAVE_FORM = r"(^|.*\.){}($|\..*)"
LAYERS_PATTERN_FORM = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

# PEFT writes every field; these it writes only in newer releases (`peft_version`), or its C3A does not know them: they
# appear in a file only where they say something, because an older PEFT warns about each field it does not know.
_WRITTEN_WHERE_SET = (
    "exclude_modules",
    "rank",
    "peft_version",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
)

_MODEL_TYPES_BY_TARGETS = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    ("key", "value", "receptance", "output"): "rwkv",
    ("q", "v"): "t5 mt5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("mlp.c_proj",): "gpt2 gpt_bigcode",
}
DEFAULT_TARGET_MODULES: dict[str, list[str] | str] = {
    model_type: list(targets)
    for targets, model_types in _MODEL_TYPES_BY_TARGETS.items()
    for model_type in model_types.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


def _name_list(value: Any, what: str) -> list[str]:
    """A list of non-empty names, each once, in their order."""
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"{what} must be a list of non-empty names, got {described(value)}")
    if len(value) > MAX_NAMES:
        raise ConfigError(f"{what} has {len(value)} names, more than {MAX_NAMES}: write a regular expression")
    return list(dict.fromkeys(value))


@public
@dataclass
class C3AConfig:
    """How a model is adapted. The fields are those of PEFT's C3A configuration, and mean the same.

    Values may be given as what stands for them: tuples, sets and OmegaConf's lists for lists, any mapping for a dict,
    numpy's numbers and strings. They are kept as plain ones, and each is checked when the configuration is built.

    Args:
        block_size: b, the size of the circulant blocks; it has to divide both widths of every adapted layer. `"auto"`
            picks one per layer by `suggest_block_size(..., rank=rank)`.
        target_modules: names (a module is adapted when its name is one of them or ends with "." and one of them), one
            regular expression that has to match the whole name, `"all-linear"`, or None for the model type's default.
            Beside `target_parameters` None and an empty list mean no module, as with PEFT's LoRA.
        block_size_pattern: regular expression → block size. A key decides for a module when it matches the whole name,
            or the whole of what follows some dot in it; the first such key wins; where none does, `block_size` holds.
        init_weights: `"xavier_uniform"` (also False), `"gaussian"`, `"kaiming_uniform"`, or True for zeros.
        bias: which biases are trained: `"none"`, `"all"` or `"c3a_only"` (those of adapted layers).
        modules_to_save: modules that are trained and saved whole, beside the adapter.
        exclude_modules: names or one regular expression, as `target_modules`: never adapted.
        layers_to_transform: with a list of targets only: the layer indexes to adapt.
        layers_pattern: the names of the lists in which these indexes count; None means any.
        rank: with `block_size="auto"` only: the rank for `suggest_block_size`; None means `DEFAULT_RANK`.
        inference_mode: build the adapter frozen.
        task_type, base_model_name_or_path, revision, auto_mapping, peft_version: kept for PEFT, not used here.
        target_parameters: names of parameters that are adapted themselves, such as the stacked weights of experts
            (`"mlp.experts.gate_up_proj"`): a parameter is when its full name is one of them or ends with "." and one
            of them. `"all-experts"` means the stacked weights of all experts.
        trainable_token_indices: tokens whose rows are trained beside the adapter, without the rest of the embedding, as
            with PEFT's LoRA: a list for the model's input embeddings, or a dict, module name (or what it ends with
            after a dot) → list. What is tied to the input embeddings (`lm_head`) follows them.
        ensure_weight_tying: let what is tied to the input embeddings have the same values as these, where they are in
            `modules_to_save` or `target_modules`; and refuse different tokens for the two.

    Raises:
        ConfigError: a value that cannot be used, named with the rule that it breaks.
    """

    block_size: int | str = 256
    target_modules: list[str] | str | None = None
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool | str = "xavier_uniform"
    bias: str = "none"
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank: int | None = None
    inference_mode: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    target_parameters: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    peft_type: ClassVar[str] = PEFT_TYPE

    def __post_init__(self) -> None:
        for item in fields(self):
            try:
                setattr(self, item.name, plain(getattr(self, item.name)))
            except RecursionError as error:
                raise ConfigError(f"{item.name} is nested too deeply") from error
        self._check_block_sizes()
        self._check_modules()
        self._check_layers()
        self._check_patterns()
        self._check_tokens()
        if not isinstance(self.init_weights, bool) and self.init_weights not in INIT_WEIGHTS:
            raise ConfigError(
                f"init_weights must be True, False or one of {INIT_WEIGHTS}, got {described(self.init_weights)}"
            )
        if self.bias not in BIASES:
            raise ConfigError(f"bias must be one of {BIASES}, got {described(self.bias)}")
        for name in ("inference_mode", "ensure_weight_tying"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {described(value)}")
        for name in ("task_type", "base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise ConfigError(f"{name} must be a string or None, got {described(value)}")
        if not (self.auto_mapping is None or isinstance(self.auto_mapping, dict)):
            raise ConfigError(f"auto_mapping must be a dict or None, got {described(self.auto_mapping)}")
        try:
            json.dumps(self.auto_mapping)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"auto_mapping has to be written as JSON: {error}") from error

    def _check_block_sizes(self) -> None:
        if self.block_size != "auto" and not is_positive_int(self.block_size):
            raise ConfigError(f'block_size must be a positive integer or "auto", got {described(self.block_size)}')
        if self.rank is not None and not is_positive_int(self.rank):
            raise ConfigError(f"rank must be a positive integer or None, got {described(self.rank)}")
        if self.rank is not None and self.block_size != "auto":
            raise ConfigError(
                f"rank={self.rank} has no meaning beside block_size={self.block_size}: "
                'set block_size="auto" or leave rank out'
            )
        pattern = {} if self.block_size_pattern is None else self.block_size_pattern
        if not isinstance(pattern, dict):
            raise ConfigError(
                f"block_size_pattern must be a dict of patterns and block sizes, got {described(pattern)}"
            )
        for key, size in pattern.items():
            if not isinstance(key, str) or not key:
                raise ConfigError(f"block_size_pattern: a key must be a non-empty regular expression, got {shown(key)}")
            if not is_positive_int(size):
                raise ConfigError(f"block_size_pattern[{shown(key)}] must be a positive integer, got {described(size)}")
        self.block_size_pattern = pattern

    def _check_modules(self) -> None:
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                self.target_modules = "all-linear"
        elif self.target_modules is not None:
            self.target_modules = _name_list(self.target_modules, "target_modules")
        self._check_parameters()
        if self.target_modules == "" or (self.target_modules == [] and self.target_parameters is None):
            raise ConfigError('target_modules is empty: name modules, give a regular expression, "all-linear" or None')
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = _name_list(self.exclude_modules, "exclude_modules")
        if self.modules_to_save is not None:
            modules_to_save = [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save
            self.modules_to_save = _name_list(modules_to_save, "modules_to_save")

    def _check_parameters(self) -> None:
        if isinstance(self.target_parameters, str):
            if self.target_parameters.lower() != "all-experts":
                raise ConfigError(
                    f'target_parameters must be a list of names, "all-experts" or None, got '
                    f"{shown(self.target_parameters)}: names of parameters are no regular expressions"
                )
            self.target_parameters = "all-experts"
        elif self.target_parameters is not None:
            self.target_parameters = _name_list(self.target_parameters, "target_parameters")
            if not self.target_parameters:
                raise ConfigError('target_parameters is empty: name parameters, or give "all-experts" or None')
            if "all-experts" in self.target_parameters:
                raise ConfigError(
                    f'target_parameters={shown(self.target_parameters)}: "all-experts" stands alone, as a string'
                )

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} works only with a list of target_modules, not with {shown(self.target_modules)}: "
                        "put the layers into the regular expression"
                    )
        layers = self.layers_to_transform
        if layers is not None and not all(
            isinstance(index, int) and not isinstance(index, bool)
            for index in (layers if isinstance(layers, list) else [layers])
        ):
            raise ConfigError(f"layers_to_transform must be a layer index or a list of them, got {described(layers)}")
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = _name_list(self.layers_pattern, "layers_pattern")

    def _check_tokens(self) -> None:
        tokens = self.trainable_token_indices
        if tokens is None:
            return
        lists: dict[str, Any] = {"": tokens}
        if isinstance(tokens, dict):
            lists = {f"[{shown(key)}]": value for key, value in tokens.items()}
        if not lists or (isinstance(tokens, dict) and not all(isinstance(key, str) and key for key in tokens)):
            raise ConfigError(
                "trainable_token_indices must be a list of token indices, or a dict of names of embeddings and such "
                f"lists, got {described(tokens)}"
            )
        for where, indices in lists.items():
            if not isinstance(indices, list) or not indices or not all(type(index) is int for index in indices):
                raise ConfigError(
                    f"trainable_token_indices{where} must be a list of token indices, got {described(indices)}"
                )
            if negative := [index for index in indices if index < 0]:
                raise ConfigError(
                    f"trainable_token_indices{where}: {negative[0]} is no token: indices count from 0 (for the last "
                    "tokens of a vocabulary write len(tokenizer) - 1)"
                )
            if twice := [index for index, count in Counter(indices).items() if count > 1]:
                raise ConfigError(f"trainable_token_indices{where}: token {twice[0]} is named more than once")

    def _check_patterns(self) -> None:
        """Compiles every pattern, after a look at what that will take."""
        layers_pattern = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        forms = [(key, BLOCK_SIZE_KEY_FORM) for key in self.block_size_pattern]
        forms += [
            (targets, "{}") for targets in (self.target_modules, self.exclude_modules) if isinstance(targets, str)
        ]
        forms += [(name, MODULES_TO_SAVE_FORM) for name in self.modules_to_save or ()]
        forms += [(pattern, LAYERS_PATTERN_FORM) for pattern in layers_pattern or ()]
        check_sizes([pattern for pattern, _ in forms])
        for pattern, form in forms:
            compile_pattern(pattern, form)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, in the form of PEFT's `adapter_config.json`.

        `exclude_modules`, `rank`, `target_parameters`, `trainable_token_indices`, `ensure_weight_tying` and
        `peft_version` are in it only where they are set: PEFT's C3A does not know the first five (it warns and ignores
        them), and its older releases do not know the last.
        """
        values: dict[str, Any] = {"peft_type": PEFT_TYPE}
        for item in fields(self):
            value = getattr(self, item.name)
            if (value is not None and value is not False) or item.name not in _WRITTEN_WHERE_SET:
                values[item.name] = type(value)(value) if isinstance(value, (list, dict)) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "C3AConfig":
        """A configuration from plain values, such as `to_dict()` of this class or of PEFT's.

        Fields that nobody here knows are left out, with a warning that names them.

        Raises:
            ConfigError: a value that cannot be used, a `peft_type` other than C3A, or dropout, which C3A has none of.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration must be a dict, got {type(values).__name__}")
        peft_type = plain(values.get("peft_type", PEFT_TYPE))
        if peft_type != PEFT_TYPE:
            raise ConfigError(
                f"this is the configuration of a {shown(peft_type)} adapter; only {PEFT_TYPE!r} can be used here"
            )
        known = {item.name for item in fields(cls)}
        for name in (name for name in values if str(name).endswith("dropout") and plain(values[name])):
            raise ConfigError(
                f"{name}={shown(values[name])}: dropout on an adapter's input is no part of C3A, here or in PEFT. "
                f"Leave {name} out (or 0); against overfitting C3A has fewer parameters (a larger block_size) and "
                "weight decay (param_groups)"
            )
        unknown = sorted(str(name) for name in values if name not in known and name != "peft_type")
        if unknown:
            warnings.warn(
                f"C3AConfig does not know these fields and ignores them: {some(unknown, most=20)}", stacklevel=2
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_any(cls, config: Any) -> "C3AConfig":
        """A configuration from a `C3AConfig` (copied and checked again), a `peft.C3AConfig`, or a dict.

        Raises:
            ConfigError: none of these, or one that cannot be used.
        """
        if isinstance(config, C3AConfig):
            return replace(config)
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if hasattr(config, "peft_type") and callable(getattr(config, "to_dict", None)):
            return cls.from_dict(config.to_dict())
        raise ConfigError(f"expected a C3AConfig, a peft.C3AConfig or a dict, got {type(config).__name__}")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json` into a folder (created where it is missing), replacing a former one whole.

        `from_pretrained` reads back an equal configuration. PEFT reads the file too; it warns about `exclude_modules`,
        `rank`, `target_parameters`, `trainable_token_indices` and `ensure_weight_tying`, where they are set, and goes
        on without them. A saved adapter's file has none of the first two, and the third and fourth only where the
        adapter has parameters or tokens of its own: such a file PEFT refuses (`with_owners`).

        Raises:
            CheckpointError: the file cannot be written.
        """
        replace_file(Path(directory) / CONFIG_NAME, self.to_json())

    def to_json(self) -> bytes:
        """`to_dict()` as the bytes of a file. Fields are sorted; patterns are not, as their order decides."""
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2).encode()

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "C3AConfig":
        """Reads the `adapter_config.json` of a folder, written by this library or by PEFT, or a file of that form.

        Raises:
            CheckpointError: the folder or the file is missing or cannot be read.
            ConfigError: the file belongs to another method, or holds a value that cannot be used.
        """
        path = Path(directory)
        if path.is_file():
            return cls.from_file_values(_read_json(path)[0], path)
        return cls.from_file_values(read_config_file(directory)[0], path / CONFIG_NAME)

    @classmethod
    def from_file_values(cls, values: Mapping[str, Any], path: Path) -> "C3AConfig":
        """`from_dict` for values read from a file: `peft_type` has to be there, and errors name the file."""
        if "peft_type" not in values:
            raise ConfigError(f"{path} has no peft_type: it is not the configuration of an adapter")
        try:
            config = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return replace(config, target_modules=_without_owners(config))


def with_owners(config: C3AConfig) -> list[str] | str | None:
    """`target_modules` and the modules that have parameters or tokens of the adapter, named in full by the others.

    PEFT refuses those; otherwise it would load the adapter without them.
    """
    targets, owners = config.target_modules, _owners(config)
    if not targets:
        return targets
    return "|".join([targets, *map(re.escape, owners)]) if isinstance(targets, str) else [*targets, *owners]


def _without_owners(config: C3AConfig) -> list[str] | str | None:
    """What `with_owners` was given."""
    targets, owners = config.target_modules, _owners(config)
    if isinstance(targets, str):
        return targets.removesuffix("".join(f"|{re.escape(owner)}" for owner in owners))
    return targets and [entry for entry in targets if entry not in owners]


def _owners(config: C3AConfig) -> list[str]:
    parameters = config.target_parameters if isinstance(config.target_parameters, list) else []
    tokens = config.trainable_token_indices if isinstance(config.trainable_token_indices, dict) else {}
    return sorted({*(name.rpartition(".")[0] for name in parameters), *tokens})


def read_config_file(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], bytes]:
    """The content of a folder's `adapter_config.json`, and the bytes it was read from.

    Raises:
        CheckpointError: there is no such folder or file, or it is no JSON object of at most 16 MiB.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    if not directory.exists():
        raise CheckpointError(
            f"there is no folder {directory}. If that names an adapter on the hub, download it first: "
            f"huggingface_hub.snapshot_download({str(directory)!r}) returns a folder"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; give the folder that holds {CONFIG_NAME}")
    try:
        return _read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {CONFIG_NAME}: it is not the folder of an adapter") from error


def _read_json(path: Path) -> tuple[dict[str, Any], bytes]:
    # What is no file (a pipe, say) may block for ever.
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot read {path}: it is not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: that is no adapter's configuration")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values, content
