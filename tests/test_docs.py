"""The README and the pages of docs/: links that lead somewhere, pages that are led to, and the newcomer's code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")


def links(page: Path) -> list[tuple[Path, str]]:
    """What a page links to in this repository: the file, and the anchor or ""."""
    found = LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in found]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = [
        (path, anchor) for path, anchor in links(page) if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert not wrong


def test_the_readme_leads_to_every_page() -> None:
    assert set(PAGES) - {path for path, _ in links(ROOT / "README.md")} == {ROOT / "README.md"}


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    integration = pytest.importorskip("c3a_triton.integrations.peft")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=256, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    monkeypatch.chdir(tmp_path)
    transformers.LlamaForCausalLM(config).save_pretrained("path/to/model")
    blocks = [code for language, code in CODE.findall((ROOT / "README.md").read_text("utf-8")) if language == "python"]
    assert len(blocks) == 3
    names = {"base": transformers.LlamaForCausalLM(config)}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        integration.unpatch_peft()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
