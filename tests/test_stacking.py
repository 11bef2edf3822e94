"""Adapters that transformers 4 has of each expert alone, in models that hold all experts of a layer in one tensor."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers.integrations.moe", reason="transformers 4: experts are layers")

import transformers
from safetensors.torch import load_file, save_file
from tiny_models import deepseek_v3, gpt_oss, llama, logits, mixtral, qwen3_moe
from transformers.core_model_loading import revert_weight_conversion

import c3a_triton
from c3a_triton import C3AConfig, CheckpointError
from c3a_triton.adapters.file_targets import with_names_of
from c3a_triton.adapters.stacking import stacked_file
from c3a_triton.bases.model_names import Place, expert_places, transposing_of
from c3a_triton.files.checkpoint import WEIGHTS_NAME, AdapterFile, write_adapter
from c3a_triton.files.patterns import block_size_rule


def nemotron_h() -> Any:
    """Experts without a gate, and other names in the checkpoint than in the model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 12}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = transformers.NemotronHConfig(**sizes, **experts, layers_block_type=["moe", "attention"])
    return transformers.NemotronHForCausalLM(config).eval()


MODELS = {"qwen3": qwen3_moe, "mixtral": mixtral, "deepseek": deepseek_v3, "nemotron": nemotron_h}
SIZE_OF = {"gate_proj": 8, "up_proj": 8, "down_proj": 4, "w1": 8, "w3": 8, "w2": 4}


def experts_of(model: Any) -> dict[str, Tensor]:
    """The weights of single experts, under the names and with the shapes that they have in transformers 4."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in revert_weight_conversion(model, model.state_dict()).items()
        if ".experts." in name
    }


def file_for(weights: dict[str, Tensor], **fields: Any) -> AdapterFile:
    """An adapter of these layers with random kernels."""
    sizes = {name: SIZE_OF.get(name.rpartition(".")[2], 4) for name in weights}
    tensors = {
        f"{name}.c3a_kernel": torch.randn(weight.shape[0] // sizes[name], weight.shape[1] // sizes[name], sizes[name])
        for name, weight in weights.items()
    }
    values = {"block_size": 8, "block_size_pattern": {"down_proj|w2": 4}, "target_modules": list(SIZE_OF)} | fields
    return AdapterFile(C3AConfig(**values), tensors, sizes, Path("adapter"))


def changed(file: AdapterFile, **tensors: Tensor) -> AdapterFile:
    """A file with other kernels for some layers."""
    new = file.tensors | {f"{name}.c3a_kernel": kernel for name, kernel in tensors.items()}
    sizes = {name.removesuffix(".c3a_kernel"): kernel.shape[-1] for name, kernel in new.items()}
    return dataclasses.replace(file, tensors=new, block_sizes=sizes)


def saved(file: AdapterFile, folder: Path) -> Path:
    sizes = file.block_sizes
    stacks = [name for name in sizes if file.tensors[f"{name}.c3a_kernel"].dim() == 4]
    write_adapter(folder, file.config, file.tensors, block_sizes=sizes, module_names=list(sizes), parameters=stacks)
    return folder


def loaded_by_transformers(model: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What transformers makes of these weights of single experts when it loads a checkpoint that has them."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {f"{name}.weight": w for name, w in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return dict(type(model).from_pretrained(folder, dtype="auto").named_parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "without", [(), ("0.gate_proj", "0.w1", "1.up_proj", "2.down_proj", "2.w2")], ids=["all", "some"]
)
def test_each_expert_s_update_is_where_transformers_puts_its_weight(tmp_path, name, without):
    model = MODELS[name]()
    weights = experts_of(model)
    adapted = {layer: weight for layer, weight in weights.items() if not layer.endswith(without or "none")}
    file = file_for(adapted, exclude_modules=list(without) or None)
    assert (len(file.block_sizes) < len(weights)) == bool(without)
    with torch.device("meta"):  # wherever new tensors go, these stay where the file's are
        stacked = stacked_file(model, file, expert_places(model))
    updates = {layer: torch.zeros_like(weight) for layer, weight in weights.items()}
    updates |= {layer: c3a_triton.circulant_matrix(file.tensors[f"{layer}.c3a_kernel"]) for layer in file.block_sizes}
    expected = loaded_by_transformers(model, updates, tmp_path)
    parameters = {parameter for parameter in expected if parameter.rpartition(".")[0].endswith(".experts")}
    assert stacked.block_sizes == {parameter: 4 if "down" in parameter else 8 for parameter in parameters}
    assert stacked.tensors.keys() == {f"{parameter}.c3a_kernel" for parameter in parameters}
    for parameter in parameters:
        found = torch.stack([c3a_triton.circulant_matrix(w) for w in stacked.tensors[f"{parameter}.c3a_kernel"]])
        assert torch.equal(found, expected[parameter])
        assert found.any()
    assert stacked.config.target_modules == []
    assert set(stacked.config.target_parameters) == parameters
    size_of = block_size_rule(stacked.config)
    assert {parameter: size_of(parameter)[0] for parameter in parameters} == stacked.block_sizes


def test_experts_that_compute_nothing_have_no_layers():
    model = qwen3_moe()
    file = file_for(experts_of(model))
    expected = stacked_file(model, file, expert_places(model))
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(6, *experts.gate_up_proj.shape[1:]))  # LongCat-Flash
    found = stacked_file(model, file, expert_places(model))
    for name, kernel in expected.tensors.items():
        assert torch.equal(found.tensors[name][:4], kernel)
        assert not found.tensors[name][4:].any()
    assert len(found.tensors["model.layers.0.mlp.experts.gate_up_proj.c3a_kernel"]) == 6


@pytest.mark.parametrize("writer", ["ours", "PEFT"])
def test_other_layers_of_the_file_stay_and_the_adapter_loads_swaps_and_saves(tmp_path, writer):
    model = deepseek_v3()
    # What is no expert but has an expert's name, and what has another.
    others = {
        name: module.weight
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "shared_experts.up_proj"))
    }
    assert len(others) == 2
    fields = {"target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"]}
    file = file_for(experts_of(model) | others, block_size_pattern={"down_proj|o_proj": 4}, **fields)
    assert file.block_sizes.keys() > others.keys()
    old = saved(file, tmp_path / "old")
    if writer == "PEFT":  # without notes beside the tensors
        save_file(load_file(old / WEIGHTS_NAME), old / WEIGHTS_NAME, metadata={"format": "pt"})
    adapted = c3a_triton.load_adapter(model, old)
    names = {name for name, _ in adapted.c3a.layers()}
    assert names == {*others, "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    config = adapted.c3a.adapters["default"]
    assert config.target_modules == ["up_proj", "o_proj"]
    assert adapted.c3a.summary().count(" 4 × ") == 2
    with pytest.warns(UserWarning, match="PEFT adapts linear layers alone .* by C3A: it cannot load .* 2 others"):
        adapted.c3a.save_pretrained(tmp_path / "new")
    again = c3a_triton.load_adapter(deepseek_v3(), tmp_path / "new")
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.allclose(logits(deepseek_v3()), logits(adapted))
    with torch.no_grad():
        for _, layer in again.c3a.layers():
            layer.c3a_kernel["default"].zero_()
    again.c3a.hotswap_adapter(old)
    assert torch.equal(logits(again), logits(adapted))
    # The configuration means the same in a model that has no adapter.
    fresh = c3a_triton.apply(deepseek_v3(), config)
    assert {name: layer.block_size for name, layer in fresh.c3a.layers()} == {
        name: layer.block_size for name, layer in adapted.c3a.layers()
    }


@pytest.mark.filterwarnings("ignore:model.layers.0.mlp.gate.weight.* computed as W")
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_a_router_that_was_a_layer_becomes_its_weight(tmp_path, name):
    model = MODELS[name]()
    router = {"qwen3": "mlp", "mixtral": "block_sparse_moe"}[name]
    linear = {f"model.layers.0.{router}.gate": model.model.layers[0].mlp.gate.weight}
    file = file_for(
        experts_of(model) | linear, target_modules=["gate", *SIZE_OF], block_size_pattern={"gate|down_proj|w2": 4}
    )
    kernel = file.tensors[f"model.layers.0.{router}.gate.c3a_kernel"]
    x, weight = torch.randn(5, 24), model.model.layers[0].mlp.gate.weight.detach().clone()
    adapted = c3a_triton.load_adapter(model, saved(file, tmp_path / "old"))
    layers = dict(adapted.c3a.layers())
    assert layers.keys() == {"model.layers.0.mlp.gate.weight", f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    assert torch.equal(layers["model.layers.0.mlp.gate.weight"].c3a_kernel["default"], kernel)
    scores = x @ (weight + c3a_triton.circulant_matrix(kernel)).T
    torch.testing.assert_close(adapted.model.layers[0].mlp.gate(x)[0], scores)
    config = adapted.c3a.adapters["default"]
    assert config.target_modules == []
    assert set(config.target_parameters) == layers.keys()
    adapted.c3a.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(c3a_triton.load_adapter(MODELS[name](), tmp_path / "new")), logits(adapted))


@pytest.mark.parametrize(
    ("fields", "modules", "parameters", "pattern"),
    [
        ({"target_modules": None}, [], 2, {"down_proj|w2": 4}),
        ({"target_modules": "all-linear"}, [], 2, {"down_proj|w2": 4}),
        ({"target_modules": r".*experts.*"}, [], 2, {"down_proj|w2": 4}),
        ({"target_parameters": "all-experts"}, [], 2, {"down_proj|w2": 4}),
        ({"target_parameters": ["scale"]}, [], 3, {"down_proj|w2": 4}),
        ({"block_size": "auto", "block_size_pattern": {}}, [], 2, {}),
        (
            {"block_size": 4, "block_size_pattern": {"gate_proj|up_proj": 8}},
            [],
            2,
            {r"model\.layers\.0\.mlp\.experts\.gate_up_proj": 8},
        ),
    ],
)
def test_the_configuration_follows(fields, modules, parameters, pattern):
    model = qwen3_moe()
    config = stacked_file(model, file_for(experts_of(model), **fields), expert_places(model)).config
    assert config.target_modules == modules
    assert len(config.target_parameters) == parameters
    assert config.block_size_pattern == pattern


def test_the_widest_dtype_holds_all_and_nothing_else_is_changed():
    model = qwen3_moe()
    file = file_for(experts_of(model))
    names = list(file.block_sizes)
    half = {name: file.tensors[f"{name}.c3a_kernel"].to(torch.bfloat16) for name in names[1:]}
    stacked = stacked_file(model, changed(file, **half), expert_places(model))
    assert all(
        kernel.dtype == torch.float32
        for kernel in stacked.tensors.values()
        if kernel.shape[-1] == file.block_sizes[names[0]]
    )
    bare = llama()
    plain = file_for({name: module.weight for name, module in bare.named_modules() if name.endswith("q_proj")})
    assert stacked_file(bare, plain, expert_places(bare)) is plain
    assert with_names_of(bare, plain) is plain


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{EXPERTS}.1.up_proj": torch.zeros(4, 6, 4)},
            rf"{EXPERTS}\.0\.gate_proj and {EXPERTS}\.1\.up_proj have kernels of shapes \[2, 3, 8\] and \[4, 6, 4\].*"
            rf"\({EXPERTS}\.gate_up_proj\): a circulant block of one size is none of another",
        ),
        (
            {f"{EXPERTS}.4.down_proj": torch.zeros(6, 4, 4)},
            rf"adapts {EXPERTS}\.4\.down_proj, and .*_proj has 4 experts",
        ),
        (
            {f"{EXPERTS}.00.down_proj": torch.zeros(6, 4, 4)},
            rf"0\.down_proj and {EXPERTS}\.00\.down_proj are for one place",
        ),
        ({f"{EXPERTS}.down_proj": torch.zeros(4, 6, 4, 4)}, rf"{EXPERTS}\.down_proj and .*down_proj are for one place"),
        # Fits together, but not into the model.
        (
            {f"{EXPERTS}.{e}.down_proj": torch.zeros(6, 6, 4) for e in range(4)},
            r"its kernel \[4, 6, 6, 4\] is for 4 matrices with in_features=24 and out_features=24, the model has 4 "
            r"matrices with in_features=16 and out_features=24",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path, change, message):
    model = qwen3_moe()
    before = {name: id(module) for name, module in model.named_modules()}
    folder = saved(changed(file_for(experts_of(model)), **change), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        c3a_triton.load_adapter(model, folder)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("targets", [list(SIZE_OF), r".*experts\.\d+\..*", "all-linear"])
def test_a_file_of_fewer_experts_is_refused(targets):
    file = file_for(experts_of(qwen3_moe()), target_modules=targets)
    model = qwen3_moe(num_experts=6)
    with pytest.raises(CheckpointError, match=rf"targets {EXPERTS}\.4\.\w+, for which it has no kernel: .* 6 experts"):
        with_names_of(model, file)
    allowed = dataclasses.replace(file.config, exclude_modules=r".*experts\.[45]\..*")
    stacked = with_names_of(model, dataclasses.replace(file, config=allowed))
    assert all(kernel.shape[0] == 6 and not kernel[4:].any() for kernel in stacked.tensors.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_experts": 5},
            rf"{EXPERTS}\.gate_up_proj: its kernel \[4, 4, 3, 8\] is for 4 matrices with in_features=24 and "
            r"out_features=32, the model has 5 matrices with in_features=24 and out_features=32",
        ),
        (
            {"moe_intermediate_size": 12},
            r"out_features=24, and b has to divide \(24, 12\) \(in, and gate and up each\)",
        ),
        ({"num_hidden_layers": 2, "mlp_only_layers": [0]}, rf"the model has no {EXPERTS}\.down_proj"),
        # A configuration that means more than its file has.
        (
            {"num_hidden_layers": 2},
            r"its configuration targets model\.layers\.1\.mlp\.experts\.\w+, for which it has no",
        ),
    ],
)
def test_stacks_of_another_model_are_refused(tmp_path, change, message):
    config = C3AConfig(block_size=8, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    c3a_triton.apply(qwen3_moe(), config).c3a.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        c3a_triton.load_adapter(qwen3_moe(**change), tmp_path)


def test_a_stack_for_a_layer_and_a_layer_for_a_stack_are_refused(tmp_path):
    model = qwen3_moe()
    weight = {"model.layers.0.self_attn.q_proj": model.model.layers[0].self_attn.q_proj.weight}
    file = file_for(weight, block_size_pattern={})
    kernel = next(iter(file.tensors.values()))
    for name, value, message in (
        (next(iter(weight)), kernel[None], r"kernel \[1, 6, 6, 4\] is for 1 matrices .*, the layer has in_features=24"),
        (f"{EXPERTS}.down_proj", kernel, r"kernel \[6, 6, 4\] is for in_features=24 .*, the model has 4 matrices"),
    ):
        folder = tmp_path / name
        tensors, sizes = {f"{name}.c3a_kernel": value}, {name: 4}
        write_adapter(folder, file.config, tensors, block_sizes=sizes, module_names=[], parameters=[name])
        with pytest.raises(CheckpointError, match=message):
            c3a_triton.load_adapter(model, folder)


def test_what_is_more_than_stacked_is_refused():
    """Ernie's checkpoints have experts for text and for pictures in one list."""
    with torch.device("meta"):
        model = transformers.Ernie4_5_VLMoeForConditionalGeneration(transformers.Ernie4_5_VLMoeConfig())
    name = "model.layers.1.mlp.experts.0.gate_proj"
    assert expert_places(model)(f"{name}.weight") is None
    with pytest.raises(
        CheckpointError, match=rf"adapts {name}, an expert .* does not say which part of it that layer is"
    ):
        with_names_of(model, file_for({name: torch.empty(16, 24)}))


def test_places_are_those_of_tensors_that_are_merely_stacked():
    place_of = expert_places(mixtral())
    assert place_of("model.layers.7.block_sparse_moe.experts.11.w3.weight") == Place(
        "model.layers.7.mlp.experts.gate_up_proj", 11, 1, 2
    )
    for name in (
        "experts.w3.weight",
        "experts.1.w3.bias",
        "experts.x.w3.weight",
        "gate.weight",
        "experts.1.q_proj.weight",
    ):
        assert place_of(f"model.layers.7.block_sparse_moe.{name}") is None
    assert expert_places(gpt_oss())("model.layers.0.mlp.experts.gate_up_proj") is None


def test_what_is_stored_with_rows_and_columns_exchanged_is_known():
    config = transformers.Qwen3VLMoeConfig()
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert transposing_of(model)(name) == (name, False)
    assert transposing_of(model)("model.language_model.layers.0.mlp.gate.weight") is None
    assert transposing_of(mixtral())(name) is None
