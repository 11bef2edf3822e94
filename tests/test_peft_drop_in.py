"""The example of PEFT and the Trainer in a short form: it runs, compares like with like, and says what it measured."""

import importlib
import json
from pathlib import Path

import pytest

for _package in ("transformers", "peft", "accelerate"):
    pytest.importorskip(_package)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    size = {"width": 64, "layers": 2, "block-size": 16, "length": 32, "batch": 2, "steps": 3, "rounds": 1}
    options = [f"--{name}={value}" for name, value in size.items()]
    importlib.import_module("peft_drop_in").main([*options, f"--json={tmp_path / 'report.json'}"])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("PEFT", "with one line", "C3A's part", "saved for backward"))
    report = json.loads((tmp_path / "report.json").read_text())
    theirs, ours = report["losses"].values()
    assert len(theirs) == len(ours) == 3
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours != theirs
    base, theirs, ours = (report[name]["saved_bytes"] for name in ("base", "PEFT", "with one line"))
    assert 0 < ours - base <= 0.5 * (theirs - base)
