"""TRL's trainers with a model that is adapted in place. A stand-in has TRL's seams; where trl is installed, it runs."""

import functools
import importlib
import itertools
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import IDS, llama, logits
from torch import nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig
from c3a_triton.integrations import trl as integration

STAND_IN = {
    "trl": "",
    "trl.trainer": "",
    "trl.trainer.utils": """
def get_config_model_id(config):
    return getattr(config, "_name_or_path", "")
def create_model_from_path(model_id, architecture=None, **kwargs):
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(model_id)
def add_fused_lm_head(model):
    original_forward = model.forward
    @functools.wraps(type(model).forward)
    def _fused_forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return original_forward(*args, **kwargs)
        return self.model(*args, **kwargs).last_hidden_state @ self.get_output_embeddings().weight.T
    model.forward = types.MethodType(_fused_forward, model)
""",
    "trl.trainer.base_trainer": """
class _BaseTrainer:
    def __init__(self, model=None, args=None):
        self.model = model
""",
    "trl.trainer.dpo_trainer": """
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id
class DPOTrainer(_BaseTrainer):
    def __init__(self, model, ref_model=None):
        if isinstance(model, str):
            model = create_model_from_path(model)
        super().__init__(model=model)
        if ref_model is None:
            ref_model = create_model_from_path(get_config_model_id(self.model.config), dtype=self.model.dtype)
        self.ref_model = ref_model
        add_fused_lm_head(self.model)
        add_fused_lm_head(self.ref_model)
        self.model.add_model_tags(["trl", "dpo"])
""",
    "trl.trainer.reward_trainer": """
from trl.trainer.base_trainer import _BaseTrainer
class RewardTrainer(_BaseTrainer):
    def __init__(self, model):
        super().__init__(model=model)
""",
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package trl on the path, of which nothing is imported."""
    integration.unpatch_trl()
    for name, source in STAND_IN.items():
        folder = tmp_path / "site" / Path(*name.split("."))
        is_package = any(other.startswith(f"{name}.") for other in STAND_IN)
        file = folder / "__init__.py" if is_package else folder.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"import functools, types\n{source}")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "trl" or name.startswith("trl.")}
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    integration.unpatch_trl()
    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        del sys.modules[name]
    sys.modules.update(before)


def policy(folder: Path, *targets: str, **fields: Any) -> Any:
    """A model from disk with an adapter that has been trained before."""
    if not folder.exists():
        llama().save_pretrained(folder)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    config = C3AConfig(block_size=4, target_modules=list(targets or ["q_proj"]), init_weights="gaussian", **fields)
    torch.manual_seed(0)
    return c3a_triton.apply(model, config)


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.ones_like(parameter))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("first", ["trl", "adapter"])
def test_the_reference_is_the_policy_before_training(first: str, tmp_path: Path) -> None:
    if first == "trl":
        importlib.import_module("trl.trainer.dpo_trainer")
    model = policy(tmp_path / "base", modules_to_save=["lm_head"])
    expected = logits(model)
    trainer = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer(model)
    torch.testing.assert_close(logits(trainer.ref_model), expected)
    torch.testing.assert_close(trainer.ref_model(IDS, fused_lm_head=True), expected)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())
    assert not trainer.ref_model.training
    train(model)
    assert not torch.allclose(logits(model), expected)
    torch.testing.assert_close(logits(trainer.ref_model), expected)
    # What a second trainer gets is the policy as it is now; the first one's forward does not come along.
    expected = logits(model)
    second = importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer(model)
    train(model)
    for kwargs in ({}, {"fused_lm_head": True}):
        y = second.ref_model(IDS, **kwargs)
        torch.testing.assert_close(y if kwargs else y.logits, expected)


@pytest.mark.usefixtures("stand_in")
def test_whatever_else_a_trainer_loads_is_loaded(tmp_path: Path) -> None:
    trl = importlib.import_module("trl.trainer.dpo_trainer")
    model = policy(tmp_path / "base")
    # A reference that is given, a model that is not adapted, one by its path, one after unpatching.
    given = llama()
    assert trl.DPOTrainer(model, given).ref_model is given
    plain = trl.DPOTrainer(str(tmp_path / "base"))
    assert not hasattr(plain.model, "c3a")
    assert not hasattr(plain.ref_model, "c3a")
    torch.testing.assert_close(logits(plain.ref_model), logits(plain.model))
    integration.unpatch_trl()
    assert not hasattr(trl.DPOTrainer(model).ref_model, "c3a")
    integration.patch_trl()
    assert hasattr(trl.DPOTrainer(model).ref_model, "c3a")


@pytest.mark.usefixtures("stand_in")
def test_sharded_policies_have_no_copy(tmp_path: Path) -> None:
    trl = importlib.import_module("trl.trainer.dpo_trainer")
    model = policy(tmp_path / "base")
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what it partitions
    with pytest.raises(AdapterStateError, match="give the trainer a ref_model of your own"):
        trl.DPOTrainer(model)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("first", ["trl", "adapter"])
def test_an_adapted_head_is_refused_where_it_is_not_called(first: str, tmp_path: Path) -> None:
    if first == "trl":
        importlib.import_module("trl.trainer.dpo_trainer")
    model = policy(tmp_path / "base", "q_proj", "lm_head")
    before = model.forward
    with pytest.raises(AdapterStateError, match=r"lm_head is adapted, but DPOTrainer .*modules_to_save=\[.lm_head.\]"):
        importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer(model)
    assert model.forward == before
    # Trainers that call the head are welcome.
    assert importlib.import_module("trl.trainer.reward_trainer").RewardTrainer(model).model is model


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_head_is_told_where_it_is(training: bool, tmp_path: Path) -> None:
    utils = importlib.import_module("trl.trainer.utils")
    model = policy(tmp_path / "base", "q_proj", "lm_head").train(training)
    utils.add_fused_lm_head(model)
    with warnings.catch_warnings(record=True) as said, torch.set_grad_enabled(training):
        warnings.simplefilter("always")
        for _ in range(3):
            y = model(IDS, fused_lm_head=True)
            if training:
                y.sum().backward()
    texts = [text for w in said if "lm_head" in (text := str(w.message))]
    assert len(texts) == 1
    assert "lm_head is adapted" in texts[0]
    assert "trl" in texts[0]
    # It is not merged, for it was never called; after a call it is.
    assert model.c3a._watch.uncalled == {"lm_head"}
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(model.c3a.merge_and_unload()(IDS).logits, expected)


@pytest.mark.usefixtures("stand_in")
def test_a_fused_head_in_a_trainer_that_was_not_seen(tmp_path: Path) -> None:
    trl = importlib.import_module("trl.trainer.dpo_trainer")
    model = policy(tmp_path / "base", "lm_head")
    integration.unpatch_trl()
    trainer = trl.DPOTrainer(model)
    with pytest.raises(AdapterStateError, match="lm_head is adapted, but this trainer of TRL multiplies"):
        trainer.model(IDS, fused_lm_head=True)


def test_fused_heads_behind_wrappers() -> None:
    """functools.wraps gives a wrapper the name of the forward that it wraps, and its module."""
    namespace: dict[str, Any] = {"__name__": "cut_cross_entropy.transformers.llama", "functools": functools}
    exec("def forward(self, *args, **kwargs):\n    return self.model(*args, **kwargs)", namespace)
    model = llama()

    @functools.wraps(type(model).forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return namespace["forward"](self, *args, **kwargs)

    wrapper.__wrapped__ = namespace["forward"]  # type: ignore[attr-defined]
    model.forward = types.MethodType(wrapper, model)
    with pytest.warns(UserWarning, match=r"lm_head is adapted.*cut_cross_entropy"):
        c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["lm_head"]))


def test_the_import_is_watched_once() -> None:
    integration.unpatch_trl()
    for _ in range(2):
        c3a_triton.apply(nn.Sequential(nn.Linear(4, 4)), C3AConfig(block_size=2, target_modules=["0"]))
    finders = [finder for finder in sys.meta_path if type(finder).__name__ == "_AtImport"]
    assert len(finders) == (0 if "trl.trainer.base_trainer" in sys.modules else 1)


# TRL itself


@pytest.fixture
def trl() -> Iterator[ModuleType]:
    module = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    pytest.importorskip("trl.trainer.dpo_trainer")
    yield module
    integration.unpatch_trl()


FINGERPRINTS = itertools.count()  # datasets would take another test's results for this one's


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[EOS]": 1, "[BOS]": 2, "[UNK]": 3} | {chr(97 + i): i + 4 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]"
    )


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["in place", "PeftModel"])
def test_dpo_begins_with_no_margin(kind: str, precompute: bool, trl: Any, tmp_path: Path, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: f"{next(FINGERPRINTS):064}")
    )
    monkeypatch.setattr(
        datasets.fingerprint.Hasher, "update", lambda self, value: self.m.update(f"{next(FINGERPRINTS)}".encode())
    )
    if kind == "in place":
        model = policy(tmp_path / "base", "q_proj", "v_proj")
    else:
        peft = pytest.importorskip("peft")
        config = peft.C3AConfig(block_size=4, target_modules=["q_proj"], init_weights="gaussian")
        model = c3a_triton.apply(peft.get_peft_model(llama(), config))
    args = trl.DPOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precompute,
    )
    data = datasets.Dataset.from_dict({"prompt": ["a b"] * 2, "chosen": ["c d e"] * 2, "rejected": ["x y z"] * 2})
    trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=_tokenizer())
    trainer.train()
    assert abs(next(log for log in trainer.state.log_history if "loss" in log)["rewards/margins"]) < 1e-4


def test_every_trainer_of_trl_asks_where_it_is_patched(trl: Any) -> None:
    """The seams are TRL's own: what loads a reference, and the base of trainers."""
    from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer

    integration.patch_trl()
    for module in (dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer):
        assert module.create_model_from_path is integration.create_model_from_path
        assert hasattr(module, "add_fused_lm_head")
    integration.unpatch_trl()
    assert dpo_trainer.create_model_from_path is not integration.create_model_from_path
