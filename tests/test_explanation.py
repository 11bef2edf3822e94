"""`explain`: the choice it reports is the one that is made, and its times are the cost model's."""

import pytest
import torch
from torch import nn

import c3a_triton
from c3a_triton import C3AConfig, ConfigError, ShapeError, explain
from c3a_triton.operator import cost_model, dispatch
from c3a_triton.operator.cost_model import Sizes


def rows(text):
    """The table as one dict per row."""
    lines = text.split("Microseconds")[0].splitlines()[1:]
    header = lines[0].split()
    return [dict(zip(header, line.split(), strict=False)) for line in lines[1:]]


def adapted():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)).bfloat16()
    return c3a_triton.apply(model, C3AConfig(block_size=8, target_modules=["0", "1", "2"]))


@pytest.mark.parametrize("shape", [(4096, 4096, 256), (8192, 28672, 128), (3072, 1024, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_times_and_choice_are_the_cost_model_s(monkeypatch, shape, dtype):
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    in_features, out_features, b = shape
    text = explain(shape, tokens=[1, 1000, 8192], device="cuda", dtype=dtype)
    assert "predicted (cost model)" in text
    table = rows(text)
    assert [row["tokens"] for row in table] == ["1", "1000", "8192"]
    for row in table:
        sizes = (int(row["tokens"]), in_features, out_features, b, dtype)
        for name in (*dispatch.TRITON_BACKENDS, "torch", "fold"):
            assert float(row[name]) == pytest.approx(cost_model.added_seconds(name, Sizes(*sizes)) * 1e6, abs=0.051)
        assert float(row["base"]) == pytest.approx(cost_model.base_seconds(Sizes(*sizes)) * 1e6, abs=0.051)
        assert row["auto"] == dispatch.cheapest(Sizes(*sizes))
        assert row["auto"] != "fold"
    assert len({row["auto"] for row in table}) > 1


def test_the_model_grows_with_what_it_counts():
    assert cost_model.base_seconds(Sizes(1, 4096, 4096, 0, torch.bfloat16)) == pytest.approx(
        2.5e-6 + 33.6e6 / 4.2e12, rel=0.01
    )
    assert cost_model.base_seconds(Sizes(8192, 4096, 4096, 0, torch.bfloat16)) == pytest.approx(
        2.5e-6 + 275e9 / 650e12, rel=0.01
    )
    # By its gather of w, not by its bytes.
    fold = cost_model.predicted_seconds("fold", Sizes(1, 4096, 4096, 256, torch.bfloat16))
    assert fold == pytest.approx(2.5e-6 + 8.4e6 / 462e9, rel=0.01)


def test_a_model_is_explained_by_its_distinct_layers(monkeypatch):
    monkeypatch.delenv("C3A_TRITON_BACKEND", raising=False)
    model = adapted()
    model.c3a.set_backend("fold", layers="2")
    for subject in (model, model.c3a):
        text = explain(subject, tokens=7)
        assert text.startswith("cpu, torch.bfloat16")
        table = rows(text)
        assert [(row["layers"], row["in"], row["out"], row["b"], row["auto"]) for row in table] == [
            ("1", "16", "32", "8", "torch"),
            ("1", "32", "32", "8", "torch"),
            ("1", "32", "32", "8", "torch"),
        ]
        assert [row.get("set") for row in table] == [None, None, "fold"]
    model.c3a.set_backend("auto")
    assert [row["layers"] for row in rows(explain(model, tokens=7))] == ["1", "2"]
    assert len(rows(explain(model[0]))) == 3


def test_what_the_environment_says_is_reported(monkeypatch):
    monkeypatch.setenv("C3A_TRITON_BACKEND", "reference")
    assert rows(explain((64, 64, 8), tokens=3, device="cpu"))[0]["auto"] == "reference"


def test_several_shapes():
    assert [row["out"] for row in rows(explain([(64, 64, 8), (64, 128, 8)], tokens=3))] == ["64", "128"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: explain((64, 64, 7)), ShapeError, "7"),
        (lambda: explain((64, 64)), ConfigError, "in_features, out_features, block_size"),
        (lambda: explain("q_proj"), ConfigError, "in_features, out_features, block_size"),
        (lambda: explain(3), ConfigError, "in_features, out_features, block_size"),
        (lambda: explain([]), ConfigError, "no shapes"),
        (lambda: explain((64, 64, 8), tokens=0), ConfigError, "tokens"),
        (lambda: explain((64, 64, 8), tokens=[]), ConfigError, "tokens"),
        (lambda: explain((64, 64, 8), dtype=torch.float64), ConfigError, "float64"),
        (lambda: explain(nn.Linear(4, 4)), ConfigError, "no adapted layer"),
    ],
)
def test_what_cannot_be_explained_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
