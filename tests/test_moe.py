"""The example and the benchmark of adapted experts, in small."""

import json
from pathlib import Path

import bench_package  # noqa: F401
import pytest
from scripts import run_example

pytest.importorskip("transformers.integrations.moe")


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="PEFT adapts linear layers alone"):
        assert run_example("moe", tmp_path, "--steps", "4") == 0
    printed = capsys.readouterr().out
    assert printed.count("loaded: logits differ by 0.0e+00") == 2
    assert printed.count("merged: logits differ by") == 2


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from bench import moe

    sizes = {"layers": 1, "hidden": 32, "inter": 16, "experts": 4, "top-k": 2, "tokens": 24, "rank": 2}
    arguments = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    assert moe.main([*arguments, "--block-sizes", "8", "--seconds", "0", "--json", str(tmp_path / "moe.json")]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "moe.json").read_text())["rows"]}
    assert list(rows) == ["base", "peft_lora", "ours, b=8"]
    assert rows["ours, b=8"]["trained"] == 4 * (32 * 32 + 32 * 16) // 8
    assert rows["ours, b=8"]["saved"]["activations"] < rows["peft_lora"]["saved"]["activations"]
    assert "| ours, b=8" in capsys.readouterr().out
