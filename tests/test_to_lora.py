"""What a LoRA made of a C3A adapter loses, in the example's short form."""

import re
from pathlib import Path

import pytest
from scripts import run_example

for _package in ("transformers", "peft", "rich"):
    pytest.importorskip(_package)


def test_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example("to_lora", tmp_path, "--short", "--block-size", "8") == 0
    printed = capsys.readouterr().out
    base, c3a = (float(value) for value in re.findall(r"^(?:base|C3A, b = 8) .* (\S+)$", printed, re.MULTILINE))
    rows = re.findall(r"^LoRA, r = (\d+) +([\d,]+) +(\d+)% +(\S+)$", printed, re.MULTILINE)
    ranks, parameters, lost, bits = zip(*rows, strict=True)
    assert list(map(int, ranks)) == [8, 16, 32, 64, 96, 128]
    # Two layers of width 64: q, k, v, o, gate and up, down.
    assert int(parameters[0].replace(",", "")) == 2 * 8 * (4 * (64 + 64) + 3 * (64 + 128))
    losses = list(map(int, lost))
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert losses[0] > 50
    assert losses[3:] == [0, 0, 0]  # of full rank
    assert float(bits[3]) == c3a != base
