"""A part of a model and the whole of it, each adapted: a layer has one manager."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, C3ALinear

CONFIG = C3AConfig(block_size=4, target_modules="all-linear", init_weights="gaussian")
HEADED = C3AConfig(block_size=4, target_modules=["up"], modules_to_save=["head"])


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(x))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = Tower(), Tower()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(self.vision(x))


def whole() -> Any:
    torch.manual_seed(0)
    return Whole()


def state(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    c3a_triton.apply(whole(), CONFIG).c3a.save_pretrained(tmp_path / "whole")
    c3a_triton.apply(whole().vision, CONFIG).c3a.save_pretrained(tmp_path / "part")
    return tmp_path


@pytest.mark.parametrize("config", [CONFIG, HEADED], ids=["layers", "a module trained whole"])
def test_a_part_then_the_whole(config: C3AConfig, folder: Path) -> None:
    model = whole()
    c3a_triton.apply(model.vision, config)
    before = state(model)
    message = r"vision has been adapted by itself \(vision\.up, vision\.head\).*vision\.c3a\.unload\(\)"
    with pytest.raises(AdapterStateError, match=message):
        c3a_triton.apply(model, CONFIG, "whole")
    with pytest.raises(AdapterStateError, match=message):
        c3a_triton.load_adapter(model, folder / "whole", "whole")
    assert state(model) == before
    assert not hasattr(model, "c3a")
    # Part by part there are two managers that know nothing of each other.
    c3a_triton.apply(model.text, CONFIG)
    model.vision.c3a.delete_adapter("default")
    assert model.text.c3a.active_adapters == ["default"]
    assert all(layer.c3a_kernel["default"].requires_grad for _, layer in model.text.c3a.layers())
    model.vision.c3a.unload()
    model.text.c3a.unload()
    c3a_triton.apply(model, CONFIG)
    assert len(list(model.c3a.layers())) == 4


@pytest.mark.parametrize("config", [CONFIG, HEADED], ids=["layers", "a module trained whole"])
def test_the_whole_then_a_part(config: C3AConfig, folder: Path) -> None:
    model = c3a_triton.apply(whole(), config)
    before, names = state(model), list(model.c3a.adapters)
    message = r"layers of this Tower \(up, head\) belong to the manager of another model"
    with pytest.raises(AdapterStateError, match=message):
        c3a_triton.apply(model.vision, CONFIG, "part")
    with pytest.raises(AdapterStateError, match=message):
        c3a_triton.load_adapter(model.vision, folder / "part", "part")
    assert state(model) == before
    assert list(model.c3a.adapters) == names
    assert not hasattr(model.vision, "c3a")
    # The way that the message tells.
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=r"vision\..*up"), "part")
    assert [name for name, layer in model.c3a.layers() if "part" in layer.c3a_kernel] == ["vision.up"]


def test_a_part_that_comes_with_its_adapters_keeps_them(tmp_path: Path) -> None:
    """Put into a model that is adapted, it is switched, saved, deleted and unloaded by its own manager alone."""
    model, tower = c3a_triton.apply(whole(), CONFIG), c3a_triton.apply(Tower(), CONFIG)
    model.vision = tower
    assert [name for name, _ in model.c3a.layers()] == ["text.up", "text.head"]
    assert all(name.startswith("text.") for name in model.c3a.state_dict())
    with pytest.raises(AdapterStateError, match="vision has been adapted by itself"):
        c3a_triton.apply(model, CONFIG, "second")
    with model.c3a.disable_adapter():
        assert not any(layer.disable_adapters for _, layer in tower.c3a.layers())
    model.c3a.unload()
    assert isinstance(model.vision.up, C3ALinear)
    assert isinstance(model.text.up, nn.Linear)
    assert tower.c3a.active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:the active adapter 'default' is deleted")
def test_copies_pickles_and_layers_of_ones_own_are_not_foreign() -> None:
    model = c3a_triton.apply(whole(), CONFIG)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        c3a_triton.apply(copied, CONFIG, "second")
        assert list(copied.c3a.adapters) == ["default", "second"]
        copied.c3a.delete_adapter("default")
        copied.c3a.unload()
        assert isinstance(copied.vision.up, nn.Linear)
    assert len(list(model.c3a.layers())) == 4
    by_hand = nn.Sequential(C3ALinear(nn.Linear(8, 8), "mine", block_size=4), nn.Linear(8, 8))
    c3a_triton.apply(by_hand, CONFIG)
    assert len(list(by_hand.c3a.layers())) == 2


class Encoding(nn.Module):
    """A model with a model in it that may be called by itself, as transformers' encoders are."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class Encoder(Tower):
    main_input_name = "x"


def test_rows_of_a_part_that_has_a_manager_of_its_own() -> None:
    model, x = Encoding(), torch.randn(2, 8)
    y = model.encoder(x)
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["head"], exclude_modules=["encoder.head"]))
    c3a_triton.apply(model.encoder, CONFIG)
    torch.testing.assert_close(model.encoder(x, adapter_names=["__base__"] * 2), y)
    assert not torch.allclose(model.encoder(x, adapter_names=["default"] * 2), y)
