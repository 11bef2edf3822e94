"""Axolotl itself with the plugin: the YAML of docs/recipes.md trained, resumed, merged; and what YAML cannot say."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", WANDB_MODE="disabled")  # read when it is imported
pytest.importorskip("axolotl")

import pages
import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.common.datasets import load_datasets
from axolotl.loaders.adapter import load_adapter
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from peft import C3AConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import c3a_triton
from c3a_triton import ConfigError
from c3a_triton.integrations.axolotl import C3APlugin
from c3a_triton.integrations.peft import C3ALinear, unpatch_peft

BASE = "path/to/model"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield
    unpatch_peft()


@pytest.fixture
def recipe() -> dict[str, Any]:
    """The page's YAML, and the model and text that it names."""
    pages.write_llama(BASE)
    pages.write_lines("text.jsonl", [{"text": piece} for piece in pages.pieces(64)])
    return yaml.safe_load(pages.recipe("Axolotl", "yaml"))


def config(fields: dict[str, Any], **changes: Any) -> Any:
    """Axolotl's configuration, as its command line reads it; a change to None takes a field out."""
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    Path("recipe.yml").write_text(yaml.safe_dump(fields))
    return load_cfg("recipe.yml")


def trained(cfg: Any) -> tuple[Any, list[float]]:
    """The model after training, and the losses of its steps."""
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return model, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.float().eval()(pages.token_batch(2)).logits


def test_trains_resumes_and_merges(recipe: dict[str, Any]) -> None:
    small = {"logging_steps": 1, "save_steps": 4, "bf16": False}
    model, losses = trained(config(recipe, **small))
    assert sum(isinstance(module, C3ALinear) for module in model.modules()) == 4
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"c3a_kernel"}
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    expected = logits(model)
    assert (logits(base()) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(c3a_triton.load_adapter(base(), recipe["output_dir"])), expected)

    # From the middle on, it comes to the same end.
    checkpoint = f"{recipe['output_dir']}/checkpoint-12"
    resumed, _ = trained(config(recipe, **small, output_dir="resumed", resume_from_checkpoint=checkpoint))
    torch.testing.assert_close(logits(resumed), expected, atol=1e-5, rtol=1e-5)

    # Going on with what is saved begins where it ended; merging makes a plain model of it.
    _, more = trained(config(recipe, **small, output_dir="more", lora_model_dir=recipe["output_dir"]))
    assert abs(more[0] - losses[-1]) < abs(more[0] - losses[0])
    config(recipe, **small)
    merge_lora("recipe.yml")
    merged = AutoModelForCausalLM.from_pretrained(f"{recipe['output_dir']}/merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_lora_beside_it(recipe: dict[str, Any]) -> None:
    """The same YAML for LoRA, with the plugin there or not, is Axolotl's own."""
    lora = {"adapter": "lora", "c3a_block_size": None, "lora_r": 8, "lora_alpha": 16, "learning_rate": 5e-3}
    model, losses = trained(config(recipe, **lora, logging_steps=1, bf16=False, save_strategy="no"))
    assert model.peft_config["default"].peft_type == "LORA"
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1


def test_a_trainer_that_builds_the_model_gets_the_configuration(recipe: dict[str, Any]) -> None:
    """Axolotl's DPO takes the configuration alone; what TRL builds of it computes through this library."""
    cfg = config(recipe, c3a_init_weights=True, c3a_block_size_pattern={"v_proj": 64}, lora_modules_to_save=["lm_head"])
    model, peft_config = load_adapter(base(), cfg, "c3a", config_only=True)
    assert model is None
    assert isinstance(peft_config, C3AConfig)
    assert peft_config.modules_to_save == ["lm_head"]
    built = get_peft_model(base(), peft_config)
    layers = {name: module for name, module in built.named_modules() if isinstance(module, C3ALinear)}
    assert {name.split(".")[-1]: module.c3a_kernel["default"].shape[-1] for name, module in layers.items()} == {
        "q_proj": 256,
        "v_proj": 64,
    }
    assert not any(module.c3a_kernel["default"].any() for module in layers.values())


def test_all_linear_layers_and_some_of_the_blocks(recipe: dict[str, Any]) -> None:
    cfg = config(
        recipe,
        lora_target_modules=None,
        lora_target_linear=True,
        peft_layers_to_transform=[1],
        peft_layers_pattern=["layers"],
    )
    model, _ = load_adapter(base(), cfg, "c3a")
    names = {name.split("layers.")[1] for name, module in model.named_modules() if isinstance(module, C3ALinear)}
    attention = {f"1.self_attn.{name}_proj" for name in "qkvo"}
    assert names == attention | {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"c3a_blocksize": 64}, r"no field 'c3a_blocksize'; C3A's are: c3a_block_size, c3a_block_size_pattern"),
        (
            {"adapter": "lora", "lora_r": 8, "lora_alpha": 16},
            "c3a_block_size is for `adapter: c3a`, but `adapter` is 'lora'",
        ),
        ({"c3a_block_size": 0}, "c3a_block_size(.|\n)*greater than 0"),
        ({"c3a_init_weights": "zeros"}, "c3a_init_weights"),
        ({"lora_r": 8}, "lora_r: 8 means nothing to `adapter: c3a`"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1 means nothing"),
        ({"peft_use_dora": True}, "peft_use_dora: True means nothing"),
        ({"lora_target_parameters": ["experts"]}, "lora_target_parameters"),
        ({"load_in_4bit": True}, "load_in_4bit: Axolotl quantizes a base for LoRA alone"),
        ({"merge_method": "memory_efficient"}, "merge_method: 'memory_efficient' merges LoRA alone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_would_do_nothing_are_refused(changes: dict[str, Any], says: str, recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as error:
        config(recipe, **changes)
    assert re.search(says, str(error.value))


def test_an_adapter_that_the_yaml_does_not_describe_is_refused(recipe: dict[str, Any]) -> None:
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
    get_peft_model(base(), C3AConfig(block_size=64, target_modules=["q_proj"])).save_pretrained("c3a")
    with pytest.raises(ConfigError, match="lora: the adapter is LORA, but `adapter` is c3a"):
        load_adapter(base(), config(recipe, lora_model_dir="lora"), "c3a")
    with pytest.raises(ConfigError, match="c3a: the adapter's block_size is 64, but c3a_block_size is 256"):
        load_adapter(base(), config(recipe, lora_model_dir="c3a"), "c3a")
    model, _ = load_adapter(base(), config(recipe, lora_model_dir="c3a", c3a_block_size=None), "c3a")
    assert [p.shape[-1] for p in model.parameters() if p.requires_grad] == [64, 64]
    with pytest.raises(ConfigError, match="lora_target_modules or lora_target_linear"):
        load_adapter(base(), config(recipe, lora_target_modules=None), "c3a")


def test_other_adapters_are_left_to_others() -> None:
    assert C3APlugin().load_adapter(None, DictDefault({"adapter": "other"})) is None
