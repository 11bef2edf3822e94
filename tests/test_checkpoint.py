import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from versions import PEFT

from c3a_triton.errors import CheckpointError, ConfigError
from c3a_triton.files import checkpoint
from c3a_triton.files.checkpoint import WEIGHTS_NAME, read_adapter, write_adapter
from c3a_triton.files.config import CONFIG_NAME, C3AConfig
from c3a_triton.files.patterns import block_size_rule, target_rule

peft = pytest.importorskip("peft")


class Small(nn.Module):
    """A top-level `fc` beside `block.fc`, whose names end alike, two more layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 48)
        self.block = nn.ModuleDict({"fc": nn.Linear(48, 48), "out": nn.Linear(48, 24)})
        self.head = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block["out"](self.block["fc"](self.fc(x))))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def kernels_for(model: nn.Module, config: C3AConfig) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Random kernels for the linear layers that a configuration means, and their block sizes."""
    tensors, sizes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and target_rule(config)(name):
            size = block_size_rule(config)(name)[0]
            sizes[name] = size
            tensors[f"{name}.c3a_kernel"] = torch.randn(module.out_features // size, module.in_features // size, size)
    return tensors, sizes


def save(directory: Path, config: C3AConfig, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    model = Small() if model is None else model
    tensors, sizes = kernels_for(model, config)
    write_adapter(directory, config, tensors, block_sizes=sizes, module_names=module_names(model))
    return tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key


def peft_loads(model: nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """What PEFT has in its layers after loading a folder, without a warning; keys as in `AdapterFile.tensors`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        loaded = peft.PeftModel.from_pretrained(model, directory)
    return {
        f"{name.removeprefix('base_model.model.')}.c3a_kernel": module.c3a_kernel["default"].data
        for name, module in loaded.named_modules()
        if type(module).__name__ == "C3ALinear"
    }


CONFIG = C3AConfig(block_size=8, target_modules=["fc", "out"], block_size_pattern={"out": 4})

CONFIGS = {
    "plain": C3AConfig(block_size=8, target_modules=["fc"]),
    "pattern kept": CONFIG,
    "order matters": C3AConfig(
        block_size=8, target_modules=["fc", "out"], block_size_pattern={"out": 4, "block.*": 12}
    ),
    "top-level key": C3AConfig(block_size=8, target_modules=["fc", "out"], block_size_pattern={"fc": 24, "block.*": 3}),
    "ungrouped": C3AConfig(block_size=8, target_modules=["fc", "out"], block_size_pattern={"fc|out": 24}),
    "names end alike": C3AConfig(block_size=8, target_modules=["fc"], block_size_pattern={r"block\.fc": 12, "fc": 4}),
    "excluded": C3AConfig(block_size=8, target_modules=["fc", "out"], exclude_modules=["block.fc"]),
    "only the top": C3AConfig(block_size=8, target_modules=["fc"], exclude_modules="block.*"),
    "expression": C3AConfig(block_size=8, target_modules=r"block\.(fc|out)"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_round_trip_and_peft_reads_ours(tmp_path, config):
    tensors = save(tmp_path, config)
    file = read_adapter(tmp_path)
    assert file.config == config
    assert file.block_sizes == {key.removesuffix(".c3a_kernel"): kernel.shape[-1] for key, kernel in tensors.items()}
    assert file.path == tmp_path
    assert_same(file.tensors, tensors)
    assert_same(peft_loads(Small(), tmp_path), tensors)


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size_pattern": {"q_proj": 4, "model.layers.0.*": 12}},
        {"exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
        {"target_modules": r"model\.layers\.0\.self_attn\.[a-z]_proj", "exclude_modules": ["o_proj", "k_proj"]},
    ],
    ids=["pattern", "excluded", "layers", "expression"],
)
def test_peft_reads_ours_on_a_llama(tmp_path, fields):
    config = C3AConfig(**{"block_size": 6, "target_modules": ["q_proj", "v_proj"], **fields})
    tensors = save(tmp_path, config, llama())
    assert tensors
    assert_same(peft_loads(llama(), tmp_path), tensors)
    # Saved again by PEFT, which sorts patterns and drops our notes, it is still the same adapter.
    peft.PeftModel.from_pretrained(llama(), tmp_path).save_pretrained(tmp_path / "again")
    assert_same(read_adapter(tmp_path / "again").tensors, tensors)
    assert_same(peft_loads(llama(), tmp_path / "again"), tensors)


@pytest.mark.parametrize("bias", ["none", "all", "c3a_only"])
def test_we_read_pefts(tmp_path, bias):
    config = peft.C3AConfig(
        block_size=8, target_modules=["fc", "out"], block_size_pattern={"out": 12}, bias=bias, modules_to_save=["head"]
    )
    model = peft.get_peft_model(Small(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = read_adapter(tmp_path)
    assert file.block_sizes == {"fc": 8, "block.fc": 8, "block.out": 12}
    assert (file.config.bias, file.config.modules_to_save) == (bias, ["head"])
    state = model.state_dict()
    expected = {f"{name}.c3a_kernel": state[f"base_model.model.{name}.c3a_kernel.default"] for name in file.block_sizes}
    expected |= {
        f"head.{part}": state[f"base_model.model.head.modules_to_save.default.{part}"] for part in ("weight", "bias")
    }
    if bias != "none" and PEFT >= (0, 20):  # older ones train biases and do not save them
        expected |= {
            f"{name}.base_layer.bias": state[f"base_model.model.{name}.base_layer.bias"] for name in file.block_sizes
        }
    assert_same(file.tensors, expected)


def test_peft_reads_our_biases_and_modules_to_save(tmp_path):
    config = dataclasses.replace(CONFIG, bias="c3a_only", modules_to_save=["head"])
    model = Small()
    tensors, sizes = kernels_for(model, config)
    tensors |= {f"{name}.base_layer.bias": torch.randn_like(model.get_submodule(name).bias) for name in sizes}
    tensors |= {"head.weight": torch.randn(6, 24), "head.bias": torch.randn(6)}
    write_adapter(tmp_path, config, tensors, block_sizes=sizes, module_names=module_names(model))
    assert_same(read_adapter(tmp_path).tensors, tensors)
    state = peft.PeftModel.from_pretrained(Small(), tmp_path).state_dict()
    for name in sizes:
        assert torch.equal(state[f"base_model.model.{name}.base_layer.bias"], tensors[f"{name}.base_layer.bias"])
    assert torch.equal(state["base_model.model.head.modules_to_save.default.weight"], tensors["head.weight"])


def test_form_of_the_files(tmp_path):
    config = C3AConfig(
        block_size="auto", rank=4, target_modules="all-linear", exclude_modules=["head"], base_model_name_or_path="a/b"
    )
    sizes = {"fc": 8, "block.fc": 8, "block.out": 4}
    tensors = {f"{name}.c3a_kernel": torch.zeros(2, 2, size) for name, size in sizes.items()}
    write_adapter(tmp_path, config, tensors, block_sizes=sizes, module_names=module_names(Small()))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    theirs = {field.name for field in dataclasses.fields(peft.C3AConfig)}
    assert written.keys() == theirs - {"peft_version"}
    assert written["inference_mode"] is True
    assert written["base_model_name_or_path"] == "a/b"
    assert (written["block_size"], written["block_size_pattern"]) == (8, {"block.out": 4})
    assert written["target_modules"] == ["fc", "out"]
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert set(file.keys()) == {f"base_model.model.{name}.c3a_kernel" for name in sizes}
        assert file.metadata()["format"] == "pt"
    assert read_adapter(tmp_path).config == config
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    assert len(modes) == 1


@pytest.mark.parametrize("fields", [{"target_modules": ["fc"]}, {"target_modules": []}, {}], ids=repr)
def test_parameters_are_written_by_name(tmp_path, fields):
    config = C3AConfig(block_size=8, block_size_pattern={"scale": 4}, target_parameters="all-experts", **fields)
    tensors, sizes = kernels_for(Small(), config) if fields.get("target_modules") else ({}, {})
    tensors |= {"h.experts.up.c3a_kernel": torch.randn(3, 2, 5, 8), "h.scale.c3a_kernel": torch.randn(2, 1, 4)}
    parameters = {"h.experts.up": 8, "h.scale": 4}
    names = module_names(Small())
    write_adapter(tmp_path, config, tensors, block_sizes=sizes | parameters, module_names=names, parameters=parameters)
    file = read_adapter(tmp_path)
    assert_same(file.tensors, tensors)
    assert file.block_sizes == sizes | parameters
    assert file.config == config
    said = C3AConfig.from_pretrained(tmp_path)  # by which the file alone can be understood
    assert said.target_parameters == ["h.experts.up", "h.scale"]
    assert {name: block_size_rule(said)(name)[0] for name in file.block_sizes} == file.block_sizes
    assert {name for name in names if target_rule(said)(name)} == sizes.keys()
    rewrite(tmp_path, {})
    assert read_adapter(tmp_path).config == said


@pytest.mark.parametrize("targets", [["fc"], ".*fc"])
def test_modules_of_parameters_are_targets_to_peft_alone(tmp_path, targets):
    config = C3AConfig(block_size=8, target_modules=targets, target_parameters=["up", "h.scale"])
    tensors, sizes = kernels_for(Small(), config)
    parameters = {"h.experts.up": 8, "h.scale": 8}
    tensors |= {f"{name}.c3a_kernel": torch.randn(2, 1, 8) for name in parameters}
    names = [*module_names(Small()), "h", "h.experts"]
    write_adapter(tmp_path, config, tensors, block_sizes=sizes | parameters, module_names=names, parameters=parameters)
    written = json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"]
    # As PEFT reads it.
    found = {n for n in names if (re.fullmatch(written, n) if isinstance(written, str) else n.endswith(tuple(written)))}
    assert {"h", "h.experts"} <= found
    assert C3AConfig.from_pretrained(tmp_path).target_modules == targets
    assert read_adapter(tmp_path).config == config
    values = json.loads((tmp_path / CONFIG_NAME).read_text()) | {"base_model_name_or_path": "elsewhere"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="in base_model_name_or_path: it holds"):
        assert read_adapter(tmp_path).config.target_modules == targets


def test_a_parameter_s_kernel_of_another_shape_is_refused(tmp_path):
    kernel = {"h.up.c3a_kernel": torch.zeros(1, 2, 6, 3, 8)}
    with pytest.raises(CheckpointError, match=r"8\], or several of these stacked, got \[1, 2, 6, 3, 8\]"):
        write_adapter(tmp_path, CONFIG, kernel, block_sizes={"h.up": 8}, module_names=[], parameters=["h.up"])


def test_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mounted object stores and network drives: modes cannot be changed, folders cannot be opened."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    opened = os.open

    def open_files(path: str | Path, *args: int, **kwargs: int) -> int:
        return forbidden() if Path(path).is_dir() else opened(path, *args, **kwargs)

    for name in ("chmod", "fchmod", "chown", "utime"):
        monkeypatch.setattr(os, name, forbidden)
    monkeypatch.setattr(os, "open", open_files)
    config = C3AConfig(block_size=4, target_modules=["fc"])
    for _ in range(2):  # a new folder, and one in which an adapter is replaced
        tensors = save(tmp_path, config)
        assert_same(read_adapter(tmp_path).tensors, tensors)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}


def test_strided_shared_and_trainable_tensors_of_any_dtype(tmp_path):
    base = torch.randn(2, 8, 24)
    tensors = {
        "fc.c3a_kernel": nn.Parameter(base[:, :, ::3]),
        "block.fc.c3a_kernel": base[0:1, 0:6, :8].to(torch.bfloat16),
        "block.out.c3a_kernel": base[1:2, 1:3, 0:8],
        "head.weight": base,
        "tied.weight": base,
        "row.weight": base[1],
    }
    sizes = {"fc": 8, "block.fc": 8, "block.out": 8}
    config = dataclasses.replace(CONFIG, modules_to_save=["head", "tied", "row"])
    write_adapter(tmp_path, config, tensors, block_sizes=sizes, module_names=module_names(Small()))
    assert_same(read_adapter(tmp_path).tensors, {key: tensor.detach() for key, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("tensors", "sizes", "error", "message"),
    [
        ({}, {}, CheckpointError, "nothing to save"),
        ({"fc.c3a_kernel": torch.zeros(6, 3, 8)}, {"fc": 8, "block.out": 8}, CheckpointError, "not both: block.out"),
        ({"fc.c3a_kernel": torch.zeros(6, 3, 8)}, {"fc": 4}, CheckpointError, "fc.c3a_kernel must have shape"),
        ({"fc.c3a_kernel": torch.zeros(2, 6, 3, 8)}, {"fc": 8}, CheckpointError, r"8\], got \[2, 6, 3, 8\]"),
        (
            {"fc.c3a_kernel": torch.zeros(6, 3, 8, device="meta")},
            {"fc": 8},
            CheckpointError,
            "meta device.*fc.c3a_kernel",
        ),
        ({"gone.c3a_kernel": torch.zeros(6, 3, 8)}, {"gone": 8}, ConfigError, "not in the model: gone"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, tensors, sizes, error, message):
    with pytest.raises(error, match=message):
        write_adapter(tmp_path / "new", CONFIG, tensors, block_sizes=sizes, module_names=module_names(Small()))
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "file", CONFIG)


@pytest.mark.parametrize("failing", ["save_file", "first", "second"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_former_adapter(tmp_path, monkeypatch, failing, existing):
    former = save(tmp_path, CONFIG) if existing else {}
    calls = []

    def replace(source: object, target: object, real=os.replace) -> None:
        calls.append(target)
        if len(calls) == {"first": 1, "second": 2}[failing]:
            raise OSError("disk full")
        real(source, target)

    def broken_save_file(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if failing == "save_file":
            patch.setattr(checkpoint, "save_file", broken_save_file)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match="disk full"):
            save(tmp_path, dataclasses.replace(CONFIG, block_size=12))
    if existing:
        assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
        file = read_adapter(tmp_path)
        assert file.config == CONFIG
        assert_same(file.tensors, former)
    else:
        assert os.listdir(tmp_path) == []


def test_a_save_killed_between_the_two_files_is_reported(tmp_path, monkeypatch):
    save(tmp_path, CONFIG)

    class Killed(BaseException):
        pass

    def replace(source: object, target: Path, real=os.replace) -> None:
        if target.name == WEIGHTS_NAME:
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save(tmp_path, dataclasses.replace(CONFIG, block_size=12))
    with pytest.raises(CheckpointError, match=rf"{CONFIG_NAME} is not .*{WEIGHTS_NAME}.*block_size is 12, was 8"):
        read_adapter(tmp_path)
    tensors = save(tmp_path, CONFIG)
    assert_same(read_adapter(tmp_path).tensors, tensors)


def test_when_even_the_former_file_cannot_be_put_back_the_error_says_so(tmp_path, monkeypatch):
    save(tmp_path, CONFIG)
    calls = []

    def replace(source: object, target: Path, real=os.replace) -> None:
        calls.append(target)
        if len(calls) > 1:
            raise OSError("disk gone")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match="of different saves now"):
            save(tmp_path, dataclasses.replace(CONFIG, block_size=12))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    with pytest.raises(CheckpointError, match="block_size is 12, was 8"):
        read_adapter(tmp_path)


def test_files_of_two_adapters_are_reported(tmp_path):
    save(tmp_path / "a", CONFIG)
    save(tmp_path / "b", dataclasses.replace(CONFIG, target_modules=["fc"], init_weights="gaussian"))
    shutil.copy(tmp_path / "a" / CONFIG_NAME, tmp_path / "b" / CONFIG_NAME)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path / "b")
    for part in (CONFIG_NAME, WEIGHTS_NAME, "target_modules", "init_weights is 'xavier_uniform', was 'gaussian'"):
        assert part in str(caught.value)


def test_a_configuration_edited_where_it_does_not_matter_is_read(tmp_path):
    save(tmp_path, dataclasses.replace(CONFIG, exclude_modules=["head"], base_model_name_or_path="old"))
    path = tmp_path / CONFIG_NAME
    values = json.loads(path.read_text())
    # Written anew by another program: other spaces, another order.
    values["target_modules"].reverse()
    path.write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adapter(tmp_path).config.exclude_modules == ["head"]
    path.write_text(json.dumps(values | {"base_model_name_or_path": "new", "peft_version": "9"}))
    with pytest.warns(UserWarning, match="changed after .* in base_model_name_or_path, peft_version"):
        config = read_adapter(tmp_path).config
    assert (config.base_model_name_or_path, config.exclude_modules, config.inference_mode) == ("new", ["head"], False)


def test_peft_files_over_ours_are_read(tmp_path):
    save(tmp_path, CONFIG)
    peft.get_peft_model(Small(), peft.C3AConfig(block_size=12, target_modules=["out"])).save_pretrained(tmp_path)
    file = read_adapter(tmp_path)
    assert file.block_sizes == {"block.out": 12}
    assert file.config.block_size == 12


def rewrite(directory: Path, change: dict[str, torch.Tensor | None], metadata: dict[str, str] | None = None) -> None:
    """Rewrites the weights with some tensors changed or, where None, left out."""
    tensors = load_file(directory / WEIGHTS_NAME) | change
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(tensors, directory / WEIGHTS_NAME, metadata or {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.c3a_kernel": torch.zeros(1)}, "keys that no C3A adapter on disk has: fc.c3a_kernel"),
        (
            {"base_model.model.fc.c3a_kernel.default": torch.zeros(1)},
            r"has: base_model\.model\.fc\.c3a_kernel\.default",
        ),
        ({"base_model.model.fc.c3a_kernel": torch.zeros(6, 24)}, r"fc\.c3a_kernel must be .*\[6, 24\]"),
        ({"base_model.model.fc.c3a_kernel": torch.zeros(1, 1, 6, 3, 8)}, r"fc\.c3a_kernel must be .*\[1, 1, 6, 3, 8\]"),
        ({"base_model.model.fc.c3a_kernel": torch.zeros(6, 3, 8, dtype=torch.int32)}, r"found torch\.int32"),
        ({"base_model.model.fc.c3a_kernel": torch.zeros(6, 3, 0)}, r"\[6, 3, 0\]"),
        ({f"base_model.model.{name}.c3a_kernel": None for name in ("fc", "block.fc", "block.out")}, "holds no C3A"),
    ],
)
def test_wrong_tensors_are_refused_by_key(tmp_path, change, message):
    save(tmp_path, CONFIG)
    rewrite(tmp_path, {"base_model.model.head.weight": torch.zeros(2), **change})
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}.*{message}"):
        read_adapter(tmp_path)


def test_kernels_of_other_float_types_are_kept_as_they_are(tmp_path):
    save(tmp_path, CONFIG)
    kernel = torch.randn(6, 3, 8).to(torch.float16)
    kernel[0, 0, 0] = float("nan")
    rewrite(tmp_path, {"base_model.model.fc.c3a_kernel": kernel})
    read = read_adapter(tmp_path).tensors["fc.c3a_kernel"]
    assert read.dtype == torch.float16
    torch.testing.assert_close(read, kernel, rtol=0, atol=0, equal_nan=True)


def test_missing_files_each_have_their_message(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=f"has no {CONFIG_NAME}"):
        read_adapter(tmp_path)
    save(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match="is a file"):
        read_adapter(tmp_path / CONFIG_NAME)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS_NAME}"):
        read_adapter(tmp_path)


def test_pickles_are_refused_unread(tmp_path):
    save(tmp_path, CONFIG)
    (tmp_path / WEIGHTS_NAME).unlink()

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(Trap(), tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle.*safe_serialization"):
        read_adapter(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_damaged_weights_are_refused_by_name(tmp_path):
    save(tmp_path, CONFIG)
    path = tmp_path / WEIGHTS_NAME
    whole = path.read_bytes()
    for length in (0, 4, 8, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}.*damaged"):
            read_adapter(tmp_path)
    # The header's length, its opening brace, and a quote of a key in it.
    for position in (0, 6, 8, 9, whole.index(b'"base_model')):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises((CheckpointError, ConfigError), match=WEIGHTS_NAME):
            read_adapter(tmp_path)


def test_every_flipped_bit_of_the_header_is_an_error_of_ours_or_harmless(tmp_path):
    save(tmp_path, CONFIG)
    path = tmp_path / WEIGHTS_NAME
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(CheckpointError, ConfigError):
                read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"c3a_triton_config": None}, "notes of c3a_triton in it are damaged"),
        ({"c3a_triton_config": "{"}, "notes of c3a_triton in it are damaged"),
        ({"c3a_triton_config": "[1]"}, "notes of c3a_triton in it are damaged"),
        ({"adapter_config": '{"block_size": -1}'}, "notes of c3a_triton in it are damaged"),
    ],
)
def test_damaged_notes_are_refused(tmp_path, notes, message):
    save(tmp_path, CONFIG)
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        metadata = {key: text for key, text in (file.metadata() | notes).items() if text is not None}
    rewrite(tmp_path, {}, metadata)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}.*{message}"):
        read_adapter(tmp_path)


def test_saving_leaves_the_memory_of_what_is_saved_alone(tmp_path):
    """FSDP resizes a parameter's storage, and storage that numpy has seen cannot be resized."""
    tensors, sizes = kernels_for(Small(), CONFIG)
    write_adapter(tmp_path, CONFIG, tensors, block_sizes=sizes, module_names=module_names(Small()))
    assert all(tensor.untyped_storage().resizable() for tensor in tensors.values())


def test_notes_of_another_version_are_ignored_with_a_warning(tmp_path):
    save(tmp_path, dataclasses.replace(CONFIG, exclude_modules=["head"]))
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata() | {"c3a_triton_format": "9"}
    rewrite(tmp_path, {}, metadata)
    with pytest.warns(UserWarning, match="another version of c3a_triton"):
        config = read_adapter(tmp_path).config
    assert config.exclude_modules is None


def test_wrong_method_and_unknown_fields(tmp_path):
    save(tmp_path, CONFIG)
    rewrite(tmp_path, {})
    path = tmp_path / CONFIG_NAME
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"brand_new": 1}))
    with pytest.warns(UserWarning, match="brand_new"):
        read_adapter(tmp_path)
    path.write_text(json.dumps(values | {"peft_type": "LORA"}))
    with pytest.raises(ConfigError, match=f"{CONFIG_NAME}.*'LORA'"):
        read_adapter(tmp_path)


def test_abandoned_temporary_files_are_harmless_and_go(tmp_path):
    save(tmp_path, CONFIG)
    old, new = tmp_path / f".{WEIGHTS_NAME}.0.tmp", tmp_path / f".{CONFIG_NAME}.1.tmp"
    other = tmp_path / "notes.tmp"
    for path in (old, new, other):
        path.write_bytes(b"rubbish")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    read_adapter(tmp_path)
    assert old.exists()
    save(tmp_path, CONFIG)
    assert not old.exists()
    assert new.exists(), "it may belong to a save that is under way"
    assert other.exists()
