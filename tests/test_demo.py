"""The demo in its short form, as a user runs it, and what it says about bad input."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from scripts import EXAMPLES, run_example

for _package in ("transformers", "peft", "rich", "matplotlib"):
    pytest.importorskip(_package)


def test_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Small steps: so few of them lower the loss only so, whatever the text of this Python's library.
    assert run_example("demo", tmp_path, "--short", "--lr-scale", "0.1") == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out" / "demo"

    # The table, with every method and what there is to say about PEFT's gradient.
    for text in (
        "C3A, c3a_triton",
        "C3A, PEFT",
        "LoRA r=",
        "trainable parameters",
        "bits/byte after",
        "wrong gradient",
    ):
        assert text in printed

    # Like is compared with like.
    report = json.loads((out / "report.json").read_text())
    ours, peft_c3a, lora = runs = report["runs"]
    assert ours["trainable_parameters"] == peft_c3a["trainable_parameters"]
    assert 0.8 < lora["trainable_parameters"] / ours["trainable_parameters"] < 1.25
    assert len({run["before"] for run in runs}) == 1
    for run in runs:
        assert run["training_curve"][0] == pytest.approx(ours["training_curve"][0], rel=0.05)  # the same first batch
        assert run["after"] == run["curve"][-1][1] < run["before"]
        assert run["seconds_per_step"] > 0

    # The files.
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name, run in zip(("c3a_triton", "peft_c3a", "peft_lora"), runs, strict=True):
        assert (out / name / "adapter_config.json").is_file()
        assert (out / name / "adapter_model.safetensors").stat().st_size == run["adapter_bytes"] > 1000

    # Logits of the trained model, of PEFT's reading of its file, and of the merged model.
    bound = 5e-2 if torch.cuda.is_available() else 1e-4
    assert len(report["differences"]) == 2
    assert all(difference <= bound for difference in report["differences"].values())
    assert printed.count(": agrees") == 2


def test_own_model_tokenizer_and_text(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    text = "the quick brown fox jumps over the lazy dog\n" * 400
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path / "model")
    config = transformers.Qwen2Config(
        vocab_size=262,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text)

    options = ("--short", "--model", "model", "--data", "text.txt", "--steps", "3", "--out", "here")
    assert run_example("demo", tmp_path, *options) == 0
    run = json.loads((tmp_path / "here" / "report.json").read_text())["runs"][0]
    assert len(run["training_curve"]) == 3
    # An untrained model knows nothing: log2 of the vocabulary for each token, of which the text has fewer than bytes.
    bytes_per_token = len(text) / len(bpe.encode(text).ids)
    assert bytes_per_token > 1.05
    assert run["before"] == pytest.approx(math.log2(262) / bytes_per_token, rel=0.1)
    assert not (tmp_path / "here" / "base").exists()


BAD_ARGUMENTS = {
    "--model nowhere": "no config.json there",
    "--data nowhere": "no such file or folder",
    "--block-size -3": "positive integer",
    "--block-size 0": "positive integer",
    "--steps 0": "at least 2",
    "--device abacus": "--device abacus",
    "--data empty": "no text files",
    "--data one": "give more text",
}


@pytest.mark.parametrize("line", BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").write_text("too short")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = importlib.import_module("demo")
    monkeypatch.setattr(demo, "train_base", None)  # nothing may be trained
    try:
        status = demo.main(line.split())
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert BAD_ARGUMENTS[line] in capsys.readouterr().err
