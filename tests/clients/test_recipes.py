"""Every recipe of docs/recipes.md runs, is read from that page, and does what the same lines with LoRA do.

Of each: the loss falls, the files are PEFT's, and who loads them computes what was trained.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import c3a_triton
from c3a_triton.integrations.peft import C3ALinear, unpatch_peft

KINDS = ["C3A", "LoRA"]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with what the recipes read. A recipe's `patch_peft()` ends with its test."""
    monkeypatch.chdir(tmp_path)
    arrange = TrainingArguments.__post_init__

    def on_the_cpu(self: TrainingArguments) -> None:  # a recipe says nothing of the machine
        self.use_cpu = True
        arrange(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_the_cpu)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pages.write_llama("path/to/model")
    yield
    unpatch_peft()


def run(heading: str, kind: str, **names: Any) -> dict[str, Any]:
    """A recipe's names after it has run, as it stands on the page or with LoRA in C3A's place."""
    code = pages.recipe(heading)
    if kind == "LoRA":
        code, c3as = re.subn(r"C3AConfig\(\s*block_size=\d+", "LoraConfig(r=8", code.replace(", init_weights=True", ""))
        code, rates = re.subn(r"learning_rate=[^,]+", "learning_rate=5e-3", code)
        assert (c3as, rates) == (1, 1)
    exec(compile(code, f"{pages.PAGE.name}: {heading}", "exec"), names)
    return names


def loaded(folder: str, kind: str) -> Any:
    """The base with the adapter that a recipe has saved, by PEFT alone."""
    unpatch_peft()
    base = AutoModelForCausalLM.from_pretrained("path/to/model")
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    assert model.peft_config["default"].peft_type == kind.upper()
    assert not any(isinstance(module, C3ALinear) for module in model.modules())
    return model


def policy(trainer: Any) -> Any:
    """What was trained, without the autocast that the trainer has put around its forward."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()


def check_files(folder: str, kind: str, trained: Any) -> None:
    """PEFT, and for C3A this library, load what was saved, and compute what was trained."""
    ids = pages.token_batch(2)
    with torch.no_grad():
        expected = trained(ids).logits
        base = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
        assert (base(ids).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(loaded(folder, kind)(ids).logits, expected, atol=1e-5, rtol=1e-5)
        if kind == "C3A":
            assert any(isinstance(module, C3ALinear) for module in trained.modules())
            ours = c3a_triton.load_adapter(base, folder).eval()
            torch.testing.assert_close(ours(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_sft(kind: str) -> None:
    pages.write_lines("text.jsonl", [{"text": piece} for piece in pages.pieces(64)])
    model = policy(run("SFT (TRL)", kind)["trainer"])
    ids = pages.token_batch(16)
    assert pages.loss(model, ids) < pages.loss(AutoModelForCausalLM.from_pretrained("path/to/model"), ids) - 0.05
    check_files("sft", kind, model)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo(kind: str) -> None:
    texts = pages.pieces(64)
    pairs = [{"prompt": text[:32], "chosen": text[32:64], "rejected": text[64:][::-1]} for text in texts]
    pages.write_lines("pairs.jsonl", pairs)
    trainer = run("DPO (TRL)", kind)["trainer"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.01
    assert logs[-1]["loss"] < logs[0]["loss"]
    check_files("dpo", kind, policy(trainer))


@pytest.mark.parametrize(("init_weights", "begins_at_reference"), [("True", True), ("'gaussian'", False)])
def test_why_an_implicit_reference_asks_for_zeros(init_weights: str, begins_at_reference: bool) -> None:
    pages.write_lines("pairs.jsonl", [{"prompt": "while", "chosen": " the", "rejected": " eht"}] * 8)
    code = pages.recipe("DPO (TRL)").replace("init_weights=True", f"init_weights={init_weights}")
    code = code.replace("num_train_epochs=3", "max_steps=1, logging_steps=1, bf16=False")
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["trainer"].state.log_history[0]["rewards/margins"] == 0) == begins_at_reference


@pytest.mark.parametrize("kind", KINDS)
def test_grpo(kind: str) -> None:
    pages.write_lines("prompts.jsonl", [{"prompt": text[:24]} for text in pages.pieces(16)])
    trainer = run("GRPO (TRL)", kind)["trainer"]
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert logs[-1]["reward"] > logs[0]["reward"]
    assert logs[0]["kl"] < logs[-1]["kl"]
    check_files("grpo", kind, policy(trainer))


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers(kind: str) -> None:
    from sentence_transformers import SentenceTransformer

    pages.write_bert("path/to/encoder")
    texts = pages.pieces(64)
    pages.write_lines("twins.jsonl", [{"anchor": text, "positive": text[1::2]} for text in texts])
    model = run("sentence-transformers", kind)["model"]

    def encoded(model: Any, texts: list[str]) -> torch.Tensor:
        return model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)

    def ranking(model: Any) -> float:
        """The loss in telling which text has these letters left out."""
        scores = 20 * encoded(model, texts) @ encoded(model, [text[1::2] for text in texts]).T
        return float(torch.nn.functional.cross_entropy(scores, torch.arange(len(texts))))

    assert ranking(model) < ranking(SentenceTransformer("path/to/encoder")) - 0.02
    unpatch_peft()
    torch.testing.assert_close(encoded(SentenceTransformer("sts"), texts), encoded(model, texts), atol=1e-5, rtol=1e-5)


def check_in_place(folder: str, model: Any, ids: torch.Tensor) -> None:
    """A model adapted in place has learnt from some text, and PEFT loads what it has saved."""
    assert pages.loss(model, ids) < pages.loss(AutoModelForCausalLM.from_pretrained("path/to/model"), ids) - 0.02
    with torch.no_grad():
        expected = model(ids[:2]).logits
    torch.testing.assert_close(loaded(folder, "C3A")(ids[:2]).logits, expected, atol=1e-4, rtol=1e-4)


def test_accelerate() -> None:
    ids = pages.token_batch(64)
    names = run("accelerate", "C3A", loader=torch.utils.data.DataLoader(ids, 4))
    check_in_place("accelerate", names["model"], ids)


def test_lightning() -> None:
    ids = pages.token_batch(64)
    module = run("Lightning", "C3A", loader=torch.utils.data.DataLoader(ids, 8))["module"]
    check_in_place("lightning", module.model, ids)


def test_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    def small() -> Any:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )

    small().save_pretrained("path/to/pipeline/unet")
    batch = torch.randn(4, 4, 8, 8), torch.randn(4, 6, 32)
    unet = run("diffusers", "C3A", batches=[batch] * 20)["unet"].eval()
    step = torch.tensor([500])
    with torch.no_grad():
        expected = unet(batch[0], step, batch[1]).sample
        base = small().eval()
        assert (base(batch[0], step, batch[1]).sample - expected).abs().max() > 1e-3
        torch.testing.assert_close(
            c3a_triton.load_adapter(base, "style").eval()(batch[0], step, batch[1]).sample, expected
        )
        by_peft = peft.PeftModel.from_pretrained(small(), "style").eval()
        torch.testing.assert_close(by_peft(batch[0], step, batch[1]).sample, expected, atol=1e-4, rtol=1e-4)


def test_every_recipe_is_run() -> None:
    """What this file names, and what the page has."""
    run_here = set(re.findall(r'(?:run|recipe)\("([^"]+)"', Path(__file__).read_text("utf-8")))
    on_page = {
        heading
        for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", pages.PAGE.read_text("utf-8"), re.M | re.S)
        if "```python" in text
    }
    assert run_here == on_page
