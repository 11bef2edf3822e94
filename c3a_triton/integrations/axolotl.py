"""Axolotl's `adapter: c3a`: a plugin that builds PEFT's model, with C3A layers that this library computes.

Axolotl then trains, resumes, saves and merges it as any PEFT model. The YAML is shown in `docs/recipes.md`.
"""

from typing import Any, Literal

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import C3AConfig, PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from pydantic import BaseModel, PositiveInt, model_validator

from c3a_triton.errors import ConfigError
from c3a_triton.files.values import shown

from .peft import patch_peft

__all__ = ["C3AArgs", "C3APlugin"]

# Axolotl's fields for adapters that C3A has a use for, and one that Axolotl itself sets. The rest are LoRA's alone.
_UNDERSTOOD = {
    "lora_model_dir",
    "lora_modules_to_save",
    "lora_target_linear",
    "lora_target_modules",
    "loraplus_lr_embedding",
    "peft_autocast_adapter_dtype",
    "peft_layers_pattern",
    "peft_layers_to_transform",
}
_QUANTIZED = ("load_in_8bit", "load_in_4bit", "gptq")


class C3AArgs(BaseModel):
    """The fields that C3A adds to Axolotl's YAML, each as in PEFT's `C3AConfig`; which layers, Axolotl's own say.

    Those are `lora_target_modules`, `lora_target_linear`, `lora_modules_to_save`, `peft_layers_to_transform`,
    `peft_layers_pattern`, `peft_autocast_adapter_dtype`, and `lora_model_dir` for an adapter to go on with.
    """

    c3a_block_size: PositiveInt | None = None
    """b, which divides both widths of each layer; PEFT's 256 if it is not given."""

    c3a_block_size_pattern: dict[str, PositiveInt] | None = None
    """Other block sizes, by the names of layers or regular expressions for them."""

    c3a_init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = None
    """How kernels begin; true means zeros, so that the first step's model is the base. PEFT's `"xavier_uniform"`."""

    @model_validator(mode="before")
    @classmethod
    def _check_c3a(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse fields that would do nothing, before anything is loaded.

        Raises:
            ConfigError: a `c3a_` field that there is not, or that stands beside another adapter; a field of LoRA's; a
                base that is to be quantized; a way to merge that knows LoRA alone.
        """
        known = sorted(C3AArgs.model_fields)
        own = sorted(name for name in data if name.startswith("c3a_"))
        if unknown := [name for name in own if name not in known]:
            raise ConfigError(f"there is no field {unknown[0]!r}; C3A's are: {', '.join(known)}")
        if data.get("adapter") != "c3a":
            if own:
                raise ConfigError(f"{own[0]} is for `adapter: c3a`, but `adapter` is {shown(data.get('adapter'))}")
            return data
        foreign = [
            name
            for name, value in sorted(data.items())
            if name.startswith(("lora_", "loraplus_", "peft")) and value and name not in _UNDERSTOOD
        ]
        if foreign:
            raise ConfigError(
                f"{foreign[0]}: {shown(data[foreign[0]])} means nothing to `adapter: c3a`; leave it out. C3A takes "
                f"{', '.join(known)}, and of Axolotl's own fields {', '.join(sorted(_UNDERSTOOD))}"
            )
        if quantized := [name for name in _QUANTIZED if data.get(name)]:
            raise ConfigError(
                f"{quantized[0]}: Axolotl quantizes a base for LoRA alone and would load it in full precision here; "
                "leave it out, or name a base_model whose files are quantized"
            )
        # Axolotl's default of this field reads LoRA's tensors, file by file; the other way merges by the model itself.
        if data.setdefault("merge_method", "legacy") != "legacy":
            raise ConfigError(
                f"merge_method: {shown(data['merge_method'])} merges LoRA alone; leave it out, or set it to legacy"
            )
        return data


class C3APlugin(BasePlugin):
    """Teaches Axolotl `adapter: c3a`.

        plugins: [c3a_triton.integrations.axolotl.C3APlugin]
        adapter: c3a

    From its first adapter on, every C3A layer that PEFT builds in the process computes through this library.
    """

    def get_input_args(self) -> str:
        """Where Axolotl finds the fields that its YAML gets."""
        return "c3a_triton.integrations.axolotl.C3AArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name that `adapter` may have. It isn't built by Axolotl's code for LoRA, nor restarted by ReLoRA."""
        return [AdapterCapabilities(name="c3a")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """A PEFT model of this model, with a new adapter or that of `lora_model_dir`, and its configuration.

        Args:
            model: the base model.
            cfg: Axolotl's configuration.
            inference: nothing is to be trained.
            config_only: no model: a trainer (DPO) builds it from the configuration.

        Returns:
            None where the YAML asks for another adapter.

        Raises:
            ConfigError: no layers are named, or the adapter in `lora_model_dir` is of another kind or block size.
        """
        if cfg.adapter != "c3a":
            return None
        patch_peft()
        config = _config(model, cfg)
        if config_only:
            return None, config
        options = (
            {}
            if cfg.peft_autocast_adapter_dtype is None
            else {"autocast_adapter_dtype": cfg.peft_autocast_adapter_dtype}
        )
        if cfg.lora_model_dir:
            _check_saved(cfg, PeftConfig.from_pretrained(cfg.lora_model_dir))
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            adapted = get_peft_model(model, config, **options)
        adapted.print_trainable_parameters()
        return adapted, config


def _config(model: Any, cfg: Any) -> C3AConfig:
    """PEFT's configuration for what the YAML says."""
    targets = cfg.lora_target_modules
    if cfg.lora_target_linear:
        from axolotl.loaders.adapter import find_all_linear_names  # which imports the registry that imports plugins

        named = [targets] if isinstance(targets, str) else targets or []
        targets = sorted({*named, *find_all_linear_names(model)})
    if not targets and not cfg.lora_model_dir:
        raise ConfigError("`adapter: c3a` needs the layers that it adapts: lora_target_modules or lora_target_linear")
    given = {
        "block_size": cfg.c3a_block_size,
        "block_size_pattern": cfg.c3a_block_size_pattern and dict(cfg.c3a_block_size_pattern),
        "init_weights": cfg.c3a_init_weights,
        "modules_to_save": cfg.lora_modules_to_save or None,
        "layers_to_transform": cfg.peft_layers_to_transform,
        "layers_pattern": cfg.peft_layers_pattern,
    }
    tasks = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
    task = next((task for word, task in tasks.items() if word in type(model).__name__), TaskType.CAUSAL_LM)
    return C3AConfig(
        target_modules=targets, task_type=task, **{name: value for name, value in given.items() if value is not None}
    )


def _check_saved(cfg: Any, saved: PeftConfig) -> None:
    """Refuse an adapter of another kind or block size than the YAML says: its files would win, without a word."""
    if saved.peft_type != PeftType.C3A:
        raise ConfigError(f"{cfg.lora_model_dir}: the adapter is {saved.peft_type.value}, but `adapter` is c3a")
    for name in ("block_size", "block_size_pattern"):
        asked, found = getattr(cfg, f"c3a_{name}"), getattr(saved, name)
        if asked is not None and asked != (found or {}):
            raise ConfigError(
                f"{cfg.lora_model_dir}: the adapter's {name} is {shown(found)}, but c3a_{name} is {shown(asked)}: "
                f"leave c3a_{name} out, or lora_model_dir"
            )
