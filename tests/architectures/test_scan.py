"""The scan's checks on a handful of architectures, and on faults planted in a model; `make scan` has all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("transformers", minversion="5.0")

import checks
import scan
import small_models
import table
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP

from c3a_triton.adapters import names


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "ViTForImageClassification"]
)
def test_an_architecture_passes(name: str) -> None:
    result = checks.check_model(*small_models.find(name))
    assert result["status"] == "pass", result
    with_head = name != "ViTForImageClassification"
    assert list(result["results"]) == [check for check in checks.CHECKS if with_head or not check.startswith("head_")]


class ReadsItsWeight(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = functional.linear(x, self.gate_proj.weight)
        return self.down_proj(functional.silu(gate) * self.up_proj(x))


class SequenceFirst(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Planted(LlamaForCausalLM):
    """A model whose first layer has another MLP."""

    mlp_class: type[LlamaMLP] = LlamaMLP

    def __init__(self, config: object) -> None:
        super().__init__(config)
        layer = self.model.layers[0]
        assert isinstance(layer, LlamaDecoderLayer)
        layer.mlp.__class__ = self.mlp_class


class WithReadWeight(Planted):
    mlp_class = ReadsItsWeight


class WithSequenceFirst(Planted):
    mlp_class = SequenceFirst


class SavesOtherValues(LlamaForCausalLM):
    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        with torch.no_grad():
            if not hasattr(self, "c3a") and "merged" in str(args[0]):
                self.model.norm.weight.mul_(2)
        super().save_pretrained(*args, **kwargs)


@pytest.mark.parametrize(
    ("model_class", "check"),
    [(WithReadWeight, "trained"), (WithSequenceFirst, "rows"), (SavesOtherValues, "saved_merge")],
)
def test_a_planted_fault_is_noticed(
    model_class: type[LlamaForCausalLM], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if check == "rows":  # time is divided among the names
        assert checks.check_model(model_class, small_models.find("LlamaForCausalLM")[1])["status"] == "pass"
        monkeypatch.setattr(names.Scope, "learn", lambda self, *trials: None)
        monkeypatch.setattr(names.Scope, "check_layout", lambda self, *args: None)
    result = checks.check_model(model_class, small_models.find("LlamaForCausalLM")[1])
    outcome, detail = result["results"][check]
    assert outcome in ("silent", "warned", "refused"), result
    assert outcome != "silent" or (result["status"] == "silent" and detail)


def test_every_architecture_of_the_mappings_is_tried() -> None:
    classes = small_models.classes()
    assert len(classes) > 600
    assert {"LlamaForCausalLM", "BertForMaskedLM", "BartForConditionalGeneration", "CLIPModel"} <= classes.keys()
    assert {"SwinForImageClassification", "WhisperForConditionalGeneration", "Wav2Vec2ForCTC"} <= classes.keys()


def test_the_page_has_the_record() -> None:
    recorded = json.loads(table.RECORD.read_text())
    assert table.page(recorded) in table.PAGE.read_text()
    bad = [name for name, entry in recorded["classes"].items() if entry[1] in ("silent", "failed", "crash", "timeout")]
    assert not bad, bad


def test_a_kind_of_failure_has_no_names() -> None:
    one = table.kind("ShapeError: model.layers.0.mlp: 2 rows at 1.5e-01 in /tmp/c3a-scan-x/base")
    two = table.kind("ShapeError: encoder.block.11.attention: 3 rows at 7.0 in /tmp/c3a-scan-y/base")
    assert one == two


@pytest.mark.nightly
def test_a_scan_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"

    def run(*arguments: str) -> int:
        command = [sys.executable, scan.__file__, "--out", str(out), "--groups", "CAUSAL_IMAGE_MODELING", *arguments]
        return subprocess.run(command, capture_output=True).returncode

    run("--seconds", "0")
    first = scan.read(out)
    assert all("longer than" in result["why"] for result in first.values())
    with out.open("a") as file:
        file.write('{"class": "Unfin')  # as a killed scan leaves it
    run()
    assert scan.read(out) == first
