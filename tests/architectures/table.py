"""The scan's results as text: a summary by kind of failure, and the tables of docs/reliability.md.

python tests/architectures/table.py out/architectures.jsonl --summary out/architectures.md
python tests/architectures/table.py out/architectures.jsonl --docs       # writes data/architectures.json and the page
python tests/architectures/table.py --check                              # whether the page agrees with that file
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
# The worst first.
STATUSES = ("silent", "failed", "crash", "timeout", "warned", "refused", "base", "pass")

# The checks in their order, as in checks.py, which imports torch.
CHECKS = (
    "apply", "zero", "forward", "backward", "trained", "rows", "one_name", "load", "merge", "unmerge", "unload",
    "saved_merge", "folder_merge", "head_load", "head_unload", "head_saved_merge", "head_folder_merge", "process",
)  # fmt: skip

Results = list[dict[str, Any]]


def kind(text: str) -> str:
    """A message without what differs from model to model: names, numbers, folders."""
    text = re.sub(r"/tmp/\S+", "<folder>", text)
    text = re.sub(r"\b[\w ]+\.py:\d+", "<line>", text)
    text = re.sub(r"\d+\.\d+(e[+-]?\d+)?|\binf\b", "#", text)
    text = re.sub(r"(?<![\w.])\w+(\.\w+)+", "<name>", text)
    text = re.sub(r"\d+", "#", text)
    text = re.sub(r"<name>((, | and )<name>)+", "<name>", text)
    text = re.sub(r"^(row # of \S+: #;? ?)+|^[\w ,]+: #$|^[\w ,]+: #(?= \|)", "differs", text)
    return text[:160]


def complaints(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(outcome, check, detail) of everything that did not pass."""
    checks = result.get("results", {})
    found = [(o, name, detail) for name, (o, detail) in checks.items() if o != "pass"]
    if result["status"] in ("crash", "timeout") or not checks:
        found.append((result["status"], "process" if result["status"] != "base" else "model", result["why"]))
    return found


def by_kind(results: Results) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """(outcome, check, kind) → (class, detail) of all that show it."""
    found: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for result in results:
        for outcome, check, detail in complaints(result):
            found[outcome, check, kind(detail)].append((result["class"], detail))
    order = {status: number for number, status in enumerate(STATUSES)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], -len(item[1]))))


def table(rows: Iterable[Iterable[object]]) -> str:
    """A table of Markdown; the first row is its head."""
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def summary(results: Results) -> str:
    """All kinds of failure with the classes that show them and a message each."""
    counts = {status: sum(result["status"] == status for result in results) for status in STATUSES}
    lines = [
        "# The scan over all architectures",
        "",
        f"{len(results)} classes tried: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n),
        "",
        "One class again: `python tests/architectures/scan.py --out /tmp/one.jsonl --only CLASS --verbose`. "
        "A class's status is its worst check; a class can be under several kinds. `base` means that the model alone "
        "does not do what the check needs.",
    ]
    for (outcome, check, _), shown in by_kind(results).items():
        if outcome == "base" and check != "model":
            continue
        names = sorted({name for name, _ in shown})
        lines += [
            "",
            f"## {outcome}: {check} ({len(names)})",
            "",
            ", ".join(names),
            "",
            f"`{shown[0][0]}`: {shown[0][1]}",
        ]
    return "\n".join(lines) + "\n"


def record(results: Results, versions: dict[str, str]) -> dict[str, Any]:
    """What is committed: versions, and class → what of it did not pass, for all classes tried."""
    classes = {}
    for result in sorted(results, key=lambda result: result["class"]):
        shown = [f"{outcome} {check}: {kind(detail)}" for outcome, check, detail in complaints(result)]
        classes[result["class"]] = [result["group"], result["status"], *shown]
    return {"versions": versions, "classes": classes}


_GROUPS = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "sequence to sequence": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "image and text": (
        "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "RETRIEVAL", "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING",
        "TABLE_QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    ),
    "audio": (
        "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "RNNT", "TDT",
    ),
    "without a head": ("MODEL",),
}  # fmt: skip


def _group(name: str) -> str:
    return next((group for group, names in _GROUPS.items() if name in names), "vision and others")


def page(recorded: dict[str, Any]) -> str:
    """The part of docs/reliability.md between the marks."""
    classes: dict[str, list[str]] = recorded["classes"]
    own = {name: entry for name, entry in classes.items() if entry[1] != "base"}
    columns = [status for status in reversed(STATUSES) if any(entry[1] == status for entry in classes.values())]
    rows: list[list[object]] = [["architectures", "tried", *columns]]
    for group in (*_GROUPS, "vision and others"):
        entries = [entry for entry in classes.values() if _group(entry[0]) == group]
        if entries:
            rows.append([group, len(entries), *(sum(e[1] == status for e in entries) for status in columns)])
    rows.append(["all", len(classes), *(sum(e[1] == status for e in classes.values()) for status in columns)])
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    passed = sum(entry[1] == "pass" for entry in classes.values())
    lines = [
        f"Of {len(classes)} classes of transformers ({versions}) {len(own)} can be built small and run by themselves; "
        f"of these {passed} pass everything.",
        "",
        table(rows),
    ]
    # (outcome, message, whether it is about rows) → class → the checks in which it appears
    reasons: dict[tuple[str, str, bool], dict[str, list[str]]] = defaultdict(dict)
    for name, (_, _, *shown) in own.items():
        for line in shown:
            outcome, _, rest = line.partition(" ")
            if outcome != "base":
                check, _, message = rest.partition(": ")
                reasons[outcome, message, check in ("rows", "one_name")].setdefault(name, []).append(check)
    if reasons:
        order = sorted(reasons.items(), key=lambda item: (STATUSES.index(item[0][0]), -len(item[1])))
        lines += ["", "What does not pass, and why:", ""]
        rows = [["outcome", "checks", "message", "classes"]]
        for (outcome, message, _), found in order:
            shown_checks = ", ".join(check for check in CHECKS if any(check in checks for checks in found.values()))
            names = sorted(found)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            rows.append([outcome, shown_checks, message, ", ".join(names[:4]) + more])
        lines.append(table(rows))
    bases: dict[str, int] = defaultdict(int)
    for entry in classes.values():
        if entry[1] == "base":
            bases[_base_reason(entry[2:])] += 1
    if bases:
        lines += ["", "What the models themselves do not do (`base`):", ""]
        lines.append(table([["reason", "classes"], *sorted(bases.items(), key=lambda item: -item[1])]))
    return "\n".join(lines)


_REASONS = {
    "a package that is not installed": ("ImportError", "requires the", "library but"),
    "too large however configured": ("million parameters", "longer than", "more than"),
    "no default configuration, or none that is small": ("no configuration", "cannot be built"),
    "no inputs found that it takes": ("no inputs",),
    "its output is not finite, not deterministic or no tensor": ("output",),
}


def _base_reason(shown: list[str]) -> str:
    text = " ".join(shown)
    return next((reason for reason, signs in _REASONS.items() if any(sign in text for sign in signs)), "other")


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}


def _with_page(text: str, part: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--summary", type=Path, help="write all kinds of failure here")
    parser.add_argument("--docs", action="store_true", help="write the committed record and the page's tables")
    parser.add_argument("--check", action="store_true", help="fail where the page does not agree with the record")
    arguments = parser.parse_args()
    if arguments.results:
        sys.path.insert(0, str(Path(__file__).parent))
        import scan

        results = list(scan.read(arguments.results).values())
        if arguments.summary:
            arguments.summary.write_text(summary(results))
        if arguments.docs:
            entries = record(results, _versions())
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries["classes"].items())
            RECORD.write_text(f'{{"versions": {json.dumps(entries["versions"])}, "classes": {{\n{lines}\n}}}}\n')
            PAGE.write_text(_with_page(PAGE.read_text(), page(entries)))
    if arguments.check:
        text = PAGE.read_text()
        return int(_with_page(text, page(json.loads(RECORD.read_text()))) != text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
