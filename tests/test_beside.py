"""What is trained beside an adapter: embeddings in its file, parameters that no file holds."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from safetensors.torch import load_file
from tiny_models import IDS, bert_classifier, llama, logits
from transformers import AutoModelForCausalLM, BartConfig, BartModel

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, CheckpointError, ConfigError, load_adapter
from c3a_triton.files.checkpoint import WEIGHTS_NAME

CONFIG = C3AConfig(block_size=4, target_modules=["q_proj"], init_weights="gaussian")
NEW_IDS = torch.cat([IDS, IDS + 24], dim=1)  # tokens 32 and 33 are new


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    llama(tied=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(34)
    return model.eval()


def trained(model: Any, config: C3AConfig = CONFIG) -> Any:
    """An adapted model whose new tokens have values that no other model's have."""
    model = c3a_triton.apply(model, config)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            getattr(module, "base_layer", module).weight[32:] = torch.linspace(-1, 1, 48).view(2, 24)
    return model


def keys(folder: Path) -> set[str]:
    return {key.removeprefix("base_model.model.") for key in load_file(folder / WEIGHTS_NAME)}


def kernels(model: Any) -> set[str]:
    return {f"{name}.c3a_kernel" for name, _ in model.c3a.layers()}


BOTH = {"model.embed_tokens.weight", "lm_head.weight"}


def test_embeddings_of_another_vocabulary_are_saved_and_put_back(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(resized(base))
    model.c3a.save_pretrained(tmp_path / "saved")
    assert keys(tmp_path / "saved") == kernels(model) | BOTH
    for other in (load_adapter(resized(base), tmp_path / "saved"), model):
        assert torch.equal(logits(other, NEW_IDS), logits(model, NEW_IDS))
        other.c3a.save_pretrained(tmp_path / "again")
        assert keys(tmp_path / "again") == kernels(model) | BOTH
    theirs = peft.PeftModel.from_pretrained(resized(base), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(theirs, NEW_IDS), logits(model, NEW_IDS), atol=1e-5, rtol=1e-5)


def test_their_adapters_files_with_embeddings_are_read(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(resized(base), peft.C3AConfig(block_size=4, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[32:] = 1.5
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(resized(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, NEW_IDS), logits(model, NEW_IDS), atol=1e-5, rtol=1e-5)


def test_an_adapted_head_of_another_vocabulary(base: Path, tmp_path: Path) -> None:
    model = trained(resized(base), C3AConfig(block_size=2, target_modules=["lm_head"], init_weights="gaussian"))
    model.c3a.save_pretrained(tmp_path / "saved")
    assert "lm_head.base_layer.weight" in keys(tmp_path / "saved")
    loaded = load_adapter(resized(base), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded, NEW_IDS), logits(model, NEW_IDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tied weight
        model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match="lm_head is to be saved .*, but .'default'. are merged"):
        model.c3a.save_pretrained(tmp_path / "merged")
    model.c3a.save_pretrained(tmp_path / "merged", save_embedding_layers=False)


def test_without_another_vocabulary_they_are_saved_where_they_are_trained(base: Path, tmp_path: Path) -> None:
    model = c3a_triton.apply(AutoModelForCausalLM.from_pretrained(base).eval(), CONFIG)
    assert model.c3a.state_dict().keys() == kernels(model)
    assert model.c3a.state_dict(save_embedding_layers=True).keys() == kernels(model) | BOTH
    model.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.c3a.save_pretrained(tmp_path / "saved")
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert keys(tmp_path / "saved") == kernels(model) | (BOTH if tied else {"model.embed_tokens.weight"})
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(base).eval(), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    # Frozen now and of the base's size, but not the base's: it is saved again, by copies and under another name, too.
    loaded.c3a.rename_adapter("default", "other")
    assert copy.deepcopy(loaded).c3a.state_dict("other").keys() == model.c3a.state_dict().keys()
    with pytest.warns(UserWarning, match="trained, but not saved with the adapter: model.embed_tokens.weight"):
        model.c3a.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert keys(tmp_path / "without") == kernels(model)


def test_a_choice_that_means_nothing(base: Path) -> None:
    model = trained(resized(base))
    with pytest.raises(ConfigError, match="save_embedding_layers must be True, False or \"auto\", got 'always'"):
        model.c3a.state_dict(save_embedding_layers="always")


def test_the_load_on_a_model_of_another_vocabulary_says_what_to_do(base: Path, tmp_path: Path) -> None:
    trained(resized(base)).c3a.save_pretrained(tmp_path / "saved")
    bare = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match=r"\[34, 24\], in the model \[32, 24\]: call model.resize_token_emb.*34"):
        load_adapter(bare, tmp_path / "saved")
    bare.resize_token_embeddings(34)
    load_adapter(bare, tmp_path / "saved")


def test_embeddings_that_are_tied_in_the_model_and_differ_in_the_file(tmp_path: Path) -> None:
    model = c3a_triton.apply(llama(), CONFIG)
    model.c3a.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match="is tied to another tensor .* load the model with tie_word_embeddings"):
        load_adapter(llama(tied=True), tmp_path)


def test_a_base_that_is_not_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the network; what is not known is said, with the way to decide."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = C3AConfig(block_size=4, target_modules=["q_proj"], base_model_name_or_path="somebody/base")
    model = c3a_triton.apply(llama(), config)
    with pytest.warns(UserWarning, match="'somebody/base' is not at hand.*save_embedding_layers=True"):
        model.c3a.save_pretrained(tmp_path / "unknown")
    assert keys(tmp_path / "unknown") == kernels(model)
    # Adapted ones are saved then: without theirs the kernels of new tokens mean nothing.
    config = C3AConfig(block_size=2, target_modules=["lm_head"], base_model_name_or_path="somebody/base")
    model = c3a_triton.apply(llama(), config)
    assert "lm_head.base_layer.weight" in model.c3a.state_dict()


def test_swapping_takes_embeddings_along(base: Path, tmp_path: Path) -> None:
    model, other = trained(resized(base)), trained(resized(base))
    with torch.no_grad():
        other.get_input_embeddings().weight[33] = 7
    other.c3a.save_pretrained(tmp_path / "other")
    model.c3a.hotswap_adapter(tmp_path / "other")
    assert torch.equal(logits(model, NEW_IDS), logits(other, NEW_IDS))


def test_embeddings_that_take_the_place_of_anothers(base: Path, tmp_path: Path) -> None:
    model = trained(resized(base))
    model.c3a.save_pretrained(tmp_path / "one")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(model, tmp_path / "one", "same")
    with torch.no_grad():
        model.get_input_embeddings().weight[33] = 7
    with pytest.warns(UserWarning, match="embed_tokens.*take the place of the model's, for 'default', 'same' too"):
        load_adapter(model, tmp_path / "one", "other")


def test_embeddings_into_which_a_layer_that_is_tied_to_them_is_merged(tmp_path: Path) -> None:
    """The file would hold the merged weight, and loading would add the update to it once more."""
    sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = BartModel(BartConfig(vocab_size=32, d_model=16, **sizes))
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["encoder.embed_tokens"]))
    model.c3a.merge_adapter()
    with pytest.raises(AdapterStateError, match="encoder.embed_tokens is to be saved beside the adapter"):
        model.c3a.save_pretrained(tmp_path, save_embedding_layers=True)
    model.c3a.unmerge_adapter()
    model.c3a.save_pretrained(tmp_path, save_embedding_layers=True)


def test_what_was_made_trainable_is_named_once(tmp_path: Path) -> None:
    model = c3a_triton.apply(bert_classifier(), C3AConfig(block_size=4, target_modules=["query"], bias="all"))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "classifier" in name:
            parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match="not saved with the adapter: .*LayerNorm.weight.*modules_to_save") as told:
        model.c3a.save_pretrained(tmp_path)
    assert len(told) == 1
    assert "bias," not in str(told[0].message)  # biases are saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.c3a.save_pretrained(tmp_path)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="not saved with the adapter: bert.embeddings.position_embeddings.weight"):
        model.c3a.save_pretrained(tmp_path)


def test_what_adapters_train_is_not_named(tmp_path: Path) -> None:
    config = C3AConfig(block_size=4, target_modules=["query"], modules_to_save=["classifier"], bias="c3a_only")
    model = c3a_triton.apply(bert_classifier(), config)
    with pytest.warns(UserWarning, match="biases"), model.c3a.disable_adapter():
        pass
    model.c3a.add_adapter("other", C3AConfig(block_size=4, target_modules=["value"]))
    model.c3a.set_adapter(["default", "other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.c3a.save_pretrained(tmp_path)
        model.c3a.save_pretrained(tmp_path / "other", "other")
        plain = c3a_triton.apply(nn.Sequential(nn.Linear(4, 4)), C3AConfig(block_size=2, target_modules=["0"]))
        plain.c3a.save_pretrained(tmp_path / "plain")


# Running statistics


class Net(nn.Module):
    """Linear layers and norms, of which some collect statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norms = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(7)))
        self.head = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True))
        self.others = nn.Sequential(
            nn.LayerNorm(8), nn.BatchNorm1d(8, momentum=0.0), nn.BatchNorm1d(8, track_running_stats=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.others(self.norms(self.linear(x))))


def bare() -> Net:
    torch.manual_seed(0)
    return Net()


def net(**config: Any) -> Any:
    return c3a_triton.apply(bare(), C3AConfig(**({"block_size": 4, "target_modules": ["linear"]} | config)))


STATISTICS = r"norms.0, norms.1, norms.2, norms.3, norms.4 and 3 more go on collecting .*modules_to_save"


def test_statistics_that_go_on_being_collected_are_named_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = net()
        model.eval()(torch.randn(4, 8))
    model.train()
    with pytest.warns(UserWarning, match=STATISTICS) as told:
        model(torch.randn(4, 8))
    assert len(told) == 1
    assert "others" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(torch.randn(4, 8))
        copy.deepcopy(model)(torch.randn(4, 8))
    model.c3a.unload()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("how", ["saved", "saved by themselves", "eval", "momentum"])
def test_statistics_that_are_saved_or_stay(how: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        names = ["norms", "head"] if how == "saved" else [*(f"norms.{i}" for i in range(7)), "head.1"]
        model = net(modules_to_save=names if how.startswith("saved") else None).train()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d)) and not how.startswith("saved"):
                module.eval() if how == "eval" else setattr(module, "momentum", 0)
        model(torch.randn(4, 8))
        model.c3a.save_pretrained(tmp_path)
        model.eval()
        x = torch.randn(4, 8)
        if how.startswith("saved"):
            assert torch.equal(c3a_triton.load_adapter(bare().eval(), tmp_path)(x), model(x))


def test_statistics_of_a_compiled_model_are_told_when_it_is_saved(tmp_path: Path) -> None:
    model = net().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(4, 8))
    with pytest.warns(UserWarning, match=STATISTICS):
        model.c3a.save_pretrained(tmp_path)
