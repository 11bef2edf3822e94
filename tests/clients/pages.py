"""The recipes of docs/recipes.md as code, and what they find where they run: tiny models, text that Python ships."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
LETTERS = 96  # of a piece of text; a token is a byte


def recipe(heading: str, language: str = "python") -> str:
    """The code under a heading of the page."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    assert section, f"no recipe {heading!r} on {PAGE.name}"
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.M | re.S)
    return code


def pieces(count: int) -> list[str]:
    """Lines of Python's documentation."""
    pages = (
        topics[name].encode("ascii", "ignore").decode() for name in ("for", "if", "try", "with", "function", "class")
    )
    text = " ".join(" ".join(pages).split())
    assert len(text) >= count * LETTERS
    return [text[i * LETTERS : (i + 1) * LETTERS] for i in range(count)]


def write_lines(path: str, rows: list[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and four special tokens before them."""
    words = ["[PAD]", "[EOS]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        pad_token="[PAD]",
        eos_token="[EOS]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=256,
    )


def _write(folder: str, config_class: Any, model_class: Any, width: int, **more: Any) -> None:
    torch.manual_seed(0)
    words = tokenizer()
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(vocab_size=len(words), max_position_embeddings=256, pad_token_id=0, **sizes, **more)
    model_class(config).save_pretrained(folder)
    words.save_pretrained(folder)


def write_llama(folder: str) -> None:
    """A causal model of width 256."""
    _write(folder, LlamaConfig, LlamaForCausalLM, 256, eos_token_id=1, bos_token_id=None)


def write_bert(folder: str) -> None:
    """An encoder of width 128."""
    _write(folder, BertConfig, BertModel, 128)


def token_batch(count: int = 8) -> torch.Tensor:
    return torch.tensor([tokenizer()(piece)["input_ids"] for piece in pieces(count)])


@torch.no_grad()
def loss(model: Any, ids: torch.Tensor) -> float:
    """The mean loss of a causal model on some text, in evaluation mode."""
    return float(model.eval()(input_ids=ids, labels=ids).loss)
