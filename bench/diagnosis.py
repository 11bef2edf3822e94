"""What `right` found wrong, again, with everything that explains it: `python -m bench.gpu tune --right FILE`.

A failed case of `kernel_cases` is computed with one thing changed at a time (options, dtypes, stages, warps, tiles) and
synchronously, and where it is wrong its wrong elements are described. A failed test runs again alone, twice, and
synchronously. A wrong layer of a benchmark is computed by every backend, in its dtype and in float32.

In processes of their own, which a wrong kernel may end:

    python -m bench.diagnosis --out FILE --case KEY        a case in all variants
    python -m bench.diagnosis --out FILE --layer JSON      a layer by all backends
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c3a_triton.benchmark import cases, gate, layer
from c3a_triton.operator.launch import plans, tiles

from . import ROOT, checks, guards, kernel_cases, launch_hooks, native_tests, processes, report, runs, sanitize

__all__ = ["Wrong", "main", "pattern", "sanitized", "subject", "variants", "wrong"]

AS_IT_WAS, ONCE_MORE, SYNCHRONOUS = "as it was", "once more", "synchronously"
BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
# Of a case what a reader may take out or put in; the others are what it is.
OPTIONS = ("unaligned", "apart", "bias", "out")
DTYPES = ("float32", "float16", "bfloat16")
LAYER_BACKENDS = ("direct", "fft", "expand", "fold", "torch")
WORST_ELEMENTS = 5
WORDS = 8  # lines of a failed test's log
CASES, TESTS, LAYERS = 24, 12, 12  # at most


# What is wrong


@dataclass(frozen=True)
class Wrong:
    """What a run of `right` found wrong of ours."""

    cases: tuple[str, ...] = ()  # keys of `kernel_cases`
    tests: tuple[str, ...] = ()  # as pytest is given them
    layers: tuple[Mapping[str, Any], ...] = ()  # records of benchmarks

    def __bool__(self) -> bool:
        return bool(self.cases or self.tests or self.layers)


def wrong(records: Mapping[str, runs.Records]) -> Wrong:
    """Read off the records of `right`, by subject."""
    keys: dict[str, None] = {}
    for record in records.get("guards", {}).values():
        keys |= dict.fromkeys(record.get("failed", ()))
    accused: set[str] = set()
    for record in records.get("sanitizer", {}).values():
        keys |= dict.fromkeys(record.get("failed", ()))
        if record.get("verdict") == "errors":
            accused |= set(record.get("kernels", ()))
    if accused:
        keys |= dict.fromkeys(case.key for case, launched in kernel_cases.launched() if accused & launched)
    known = {case.key for case in kernel_cases.CASES}
    tests = (name for record in records.get("tests", {}).values() for name in record.get("failures", ()))
    layers = tuple(
        {"key": key} | record
        for found in records.values()
        for key, record in found.items()
        if record["status"] in ("wrong", "error") and record.get("method", "").startswith("ours:")
    )
    return Wrong(tuple(key for key in keys if key in known), tuple(filter(None, map(_node, tests))), layers)


def _node(name: str) -> str | None:
    """A test's name in a JUnit report ("tests.test_some.TestClass::test") as pytest is given it."""
    module, _, test = name.partition("::")
    parts = module.split(".")
    for i, part in enumerate(parts):
        for path in sorted((ROOT / "tests").rglob(f"{part}.py")):
            return "::".join([str(path.relative_to(ROOT)), *parts[i + 1 :], test])
    return None


# Where a result is wrong


def pattern(value: Tensor, truth: Tensor, b: int, tolerance: float) -> dict[str, Any]:
    """Which elements of a result are wrong, as lines of a report and for a reader.

    Args:
        value: two-dimensional, or of more dimensions, whose last are its columns.
        truth: of the same shape, float64.
        b: block size, by which columns repeat.
        tolerance: the relative error that is allowed, by which an element is wrong.

    Returns:
        `where` in one line, the counts of `wrong` elements of all and of those not `finite`, their `rows`, `columns`,
        `blocks` of columns and `phases` (columns mod b) as ranges, the median `ratio` of found and true values, and
        the `worst` elements with their neighbours in the row.
    """
    value, truth = (tensor.detach().to("cpu", torch.float64).flatten(0, -2) for tensor in (value, truth))
    size = torch.maximum(truth.abs(), truth.square().mean().sqrt())
    error = ((value - truth).abs() / size).nan_to_num(nan=torch.inf)
    limit = kernel_cases.WORST * tolerance
    bad = error > limit if bool((error > limit).any()) else error > tolerance
    rows, columns = (bad.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    blocks, phases = ({column // b for column in columns}, {column % b for column in columns})
    return {
        "where": _where(bad, rows, columns, phases, b),
        "wrong": int(bad.sum()),
        "of": bad.numel(),
        "not_finite": int((~value.isfinite()).sum()),
        "rows": _ranges(rows),
        "columns": _ranges(columns),
        "blocks": _ranges(blocks),
        "phases": _ranges(phases),
        "ratio": float((value[bad] / truth[bad]).median()) if rows else None,
        "worst": [_element(value, truth, at) for at in error.flatten().argsort(descending=True)[:WORST_ELEMENTS]],
    }


def _where(bad: Tensor, rows: Sequence[int], columns: Sequence[int], phases: set[int], b: int) -> str:
    if not rows:
        return "no element by itself"
    n_rows, n_columns = bad.shape
    share = float(bad[rows][:, columns].double().mean())
    if len(rows) == n_rows and len(columns) == n_columns:
        return "everywhere" if share > 0.5 else f"scattered: {share:.2%}"
    where = []
    if len(rows) < n_rows:
        where.append(f"rows {_ranges(rows)} of {n_rows}")
    if len(columns) < n_columns:
        repeats = len(phases) < b and columns == [i for i in range(n_columns) if i % b in phases]
        where.append(f"columns {_ranges(phases)} mod {b}" if repeats else f"columns {_ranges(columns)} of {n_columns}")
    return ", ".join(where) + ("" if share > 0.5 else f", {share:.1%} of them")


def _ranges(numbers: Sequence[int] | set[int], most: int = 6) -> str:
    """Ascending numbers for a reader: 3, 16–31."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [str(first) if first == last else f"{first}–{last}" for first, last in found[:most]]
    return ", ".join([*shown, *([f"… ({len(found)} in all)"] if len(found) > most else [])])


def _element(value: Tensor, truth: Tensor, at: Tensor) -> dict[str, Any]:
    row, column = divmod(int(at), value.shape[1])
    near = slice(max(0, column - 1), column + 2)
    return {
        "at": [row, column],
        "got": float(value[row, column]),
        "expected": float(truth[row, column]),
        "got_around": value[row, near].tolist(),
        "expected_around": truth[row, near].tolist(),
    }


def _examined(
    results: Sequence[tuple[str, Tensor, Tensor]],
    b: int,
    tolerance: float,
    compare: Callable[[str, Tensor, Tensor], None],
    record: runs.Record,
) -> list[str]:
    """Adds to the record what is wrong with results, and their bits; returns a line for each wrong one."""
    record |= {"results": {}, "bits": {}}
    said = []
    for name, value, truth in results:
        record["bits"][name] = hashlib.sha1(_bytes(value)).hexdigest()
        try:
            compare(name, value, truth)
        except gate.GateError as error:
            found = pattern(value, truth, b, tolerance) if value.shape == truth.shape else {}
            record["results"][name] = found
            said.append(f"{error} ({found['where']})" if found else str(error))
    return said


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


# A case in variants


@dataclass(frozen=True)
class Variant:
    """A case with one thing changed."""

    name: str
    case: kernel_cases.Case
    guard: int = guards.GUARD
    launch: Mapping[str, int] = field(default_factory=dict)  # arguments of every launch that has them
    given_tiles: Mapping[tiles.Lookup, tiles.TileConfig] = field(default_factory=dict)  # in the place of committed ones


class _Described(kernel_cases._Operands):
    """Operands that remember how they were made, and what was asked of the case."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()
        self.made: dict[str, dict[str, Any]] = {}

    def __contains__(self, option: str) -> bool:
        self.asked.add(option)
        return super().__contains__(option)

    def normal(self, name: str, *shape: int, **options: Any) -> Tensor:
        tensor = super().normal(name, *shape, **options)
        self.made[f"{name} ({len(self.made)})" if name in self.made else name] = {
            "shape": list(shape),
            "dtype": str(tensor.dtype),
            "stride": list(tensor.stride()),
            "bytes_past_16": tensor.data_ptr() % 16,
            "mean": float(tensor.double().mean()),
            "largest": float(tensor.double().abs().max()),
        }
        return tensor


def variants(case: kernel_cases.Case, asked: set[str], lookups: Sequence[tiles.Lookup]) -> Iterator[Variant]:
    """The case again, then with one thing changed.

    Args:
        case: as it was.
        asked: the options that its operator looks at.
        lookups: the tiles that it asks for.
    """
    yield Variant(ONCE_MORE, case)
    for option in OPTIONS:
        if option in asked:
            name = f"without {option}" if option in case.options else f"with {option}"
            yield Variant(name, replace(case, options=case.options ^ {option}))
    for dtype in DTYPES:
        if dtype != case.dtype:
            yield Variant(f"in {dtype}", replace(case, dtype=dtype))
    yield Variant("one stage", case, launch={"num_stages": 1})
    yield Variant("four warps", case, launch={"num_warps": 4})
    # The former is fitted to the tokens, the latter has blocks of rows in their place.
    free = [lookup for lookup in lookups if lookup[0] not in ("decode_tile", "hankel_tile")]
    if free:
        small = {(name, sizes): replace(getattr(tiles, name)(*sizes), block_t=16) for name, sizes in free}
        yield Variant("16 tokens a tile", case, given_tiles=small)
    yield Variant("without guards", case, guard=0)


@contextmanager
def _launched_as(variant: Variant) -> Iterator[None]:
    """Within it, tiles and launches are the variant's."""

    def changed(run: Callable[..., Any]) -> Callable[..., Any]:
        def changed_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            return run(kernel, *args, **kwargs | {k: v for k, v in variant.launch.items() if k in kwargs})

        return changed_run

    with launch_hooks.caught(changed) if variant.launch else nullcontext():
        tiles.override(variant.given_tiles)
        plans.clear_plans()
        try:
            yield
        finally:
            tiles.override({})
            plans.clear_plans()


def _compute(variant: Variant, device: torch.device, record: runs.Record) -> None:
    case = variant.case
    with _launched_as(variant), tiles.recorded() as lookups:
        results, damage, given = kernel_cases.computed(case, device, guard=variant.guard, operands=_Described)
    assert isinstance(given, _Described)
    record |= {"asked": sorted(given.asked), "operands": given.made, "tiles": sorted(lookups, key=str)}
    compare = partial(kernel_cases.compare, tolerance=case.tolerance)
    said = [*damage, *_examined(results, case.b, case.tolerance, compare, record)]
    if said:
        raise gate.GateError("; ".join(said))


# A layer by all backends


def _layer_case(found: Mapping[str, Any]) -> layer.Case:
    return (cases.DecoderCase if "hidden" in found else cases.LayerCase)(**found)


def _compute_layer(case: layer.Case, backend: str, device: torch.device, record: runs.Record) -> None:
    work = layer.Workload.of(case, f"ours:{backend}", device)
    dtype = getattr(torch, case.dtype)
    check = partial(gate.check, dtype=dtype)
    said = _examined(list(work.results(gate.Truths())), case.b, gate.TOLERANCES[dtype], check, record)
    if said:
        raise gate.GateError("; ".join(said))


# The process that computes


def _child(args: argparse.Namespace, device: torch.device) -> int:
    """Everything about a case or a layer, written to FILE one by one; goes on behind what ended it before."""
    results = sanitize.opened(args.out)

    def attempt(name: str, measure: Callable[[runs.Record], None]) -> runs.Record:
        if name in results["cases"]:
            return results["cases"][name]
        results["running"] = name
        report.write_json(args.out, results)
        lost = False
        try:
            record = runs.attempt(runs.Task(name, 0, measure), device)
        except runs.DeviceLostError as error:
            record, lost = error.args[0], True
        results["cases"][name], results["running"] = record, None
        report.write_json(args.out, results)
        print(f"{name}: {record['status']} {record.get('message', '')}", flush=True)
        if lost:
            raise SystemExit(1)
        return record

    if args.layer is not None:
        case = _layer_case(json.loads(args.layer))
        for dtype in dict.fromkeys((case.dtype, "float32")):
            for backend in LAYER_BACKENDS:
                measure = partial(_compute_layer, replace(case, dtype=dtype), backend, device)
                attempt(f"{backend} in {dtype}", measure)
    else:
        (kernel_case,) = (case for case in kernel_cases.CASES if case.key == args.case)
        first = attempt(AS_IT_WAS, partial(_compute, Variant(AS_IT_WAS, kernel_case), device))
        asked = set(first.get("asked", kernel_case.options))
        lookups = [(name, tuple(sizes)) for name, sizes in first.get("tiles", ())]
        for variant in [] if args.once else variants(kernel_case, asked, lookups):
            attempt(variant.name, partial(_compute, variant, device))
    results["done"] = True
    report.write_json(args.out, results)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Compute; returns the exit status, which says nothing of the results."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.diagnosis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file for the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 (default: %(default)s)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--case", metavar="KEY", help="of `kernel_cases`")
    what.add_argument("--layer", metavar="JSON", help="a case of a benchmark, as its record has it")
    parser.add_argument("--once", action="store_true", help="the case as it was, and no variants")
    args = parser.parse_args(argv)
    return _child(args, torch.device(args.device))


# What the job runs


def subject(found: Wrong) -> runs.Subject:
    """The part of the job that runs what was wrong again: the kernels' cases, the tests, the layers."""

    def tasks(setting: runs.Setting) -> Iterator[runs.Task]:
        # A case and a test are more than one process each.
        for kind, items, of_one, at_once in (
            ("cases", found.cases[:CASES], _case_again, setting.workers // 2),
            ("tests", found.tests[:TESTS], _test_again, setting.workers // 3),
            ("layers", found.layers[:LAYERS], _layer_again, setting.workers),
        ):
            size = max(1, at_once)
            for first in range(0, len(items), size):
                some = items[first : first + size]
                measure = partial(_side_by_side, setting, of_one, some)
                yield runs.Task(f"{kind} {first + 1} to {first + len(some)}", first // size, measure, 20.0)

    return runs.Subject(
        "again", "What was wrong, again", tasks, _tables, goals=lambda records: [], plot=lambda records, path: None
    )


def sanitized(found: Wrong) -> runs.Subject | None:
    """The failed cases under memcheck and racecheck; None without such cases."""
    if not found.cases:
        return None
    pattern_of_all = "|".join(re.escape(key) for key in found.cases[:CASES])
    return checks.sanitized(("memcheck", "racecheck"), f"^(?:{pattern_of_all})$")


def _side_by_side(
    setting: runs.Setting,
    of_one: Callable[[runs.Setting, Path, Any], tuple[str, runs.Record]],
    items: Sequence[Any],
    record: runs.Record,
) -> None:
    folder = setting.scratch / "again"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(items)) as pool:
        record["found"] = dict(pool.map(partial(of_one, setting, folder), items))
    still = [key for key, found in record["found"].items() if found["wrong"]]
    if still:
        record |= {"status": "wrong", "message": f"wrong again: {'; '.join(still)}"}


def _file_name(text: str) -> str:
    """A name for files about it."""
    return re.sub(r"\W+", "-", text)[:60] + "-" + hashlib.sha1(text.encode()).hexdigest()[:8]


def _process(setting: runs.Setting, folder: Path, name: str, *options: str, **environment: str) -> dict[str, Any]:
    path = folder / f"{_file_name(name)}.json"
    command = [*processes.python("bench.diagnosis"), "--out", str(path.resolve()), "--device", str(setting.device)]
    return checks.continued(setting, [*command, *options], path, **environment)["cases"]


def _case_again(setting: runs.Setting, folder: Path, key: str) -> tuple[str, runs.Record]:
    with ThreadPoolExecutor(2) as pool:
        blocking = pool.submit(_process, setting, folder, f"{key} {SYNCHRONOUS}", "--case", key, "--once", **BLOCKING)
        found = _process(setting, folder, key, "--case", key)
        synchronous = blocking.result().get(AS_IT_WAS)
    if synchronous is not None:
        found[SYNCHRONOUS] = synchronous
    first, second = (found.get(name, {}).get("bits") for name in (AS_IT_WAS, ONCE_MORE))
    same = None if first is None or second is None else first == second
    is_wrong = any(_is_wrong(found[name]) for name in (AS_IT_WAS, ONCE_MORE, SYNCHRONOUS) if name in found)
    return key, {"kind": "case", "variants": found, "same_bits": same, "wrong": is_wrong}


def _is_wrong(record: runs.Record) -> bool:
    return record["status"] in ("wrong", "error")


def _test_again(setting: runs.Setting, folder: Path, node: str) -> tuple[str, runs.Record]:
    names = {AS_IT_WAS: {}, ONCE_MORE: {}, SYNCHRONOUS: BLOCKING}
    limit = max(1.0, setting.seconds_left() - native_tests.GRACE)

    def run(name: str) -> dict[str, Any]:
        out = folder / _file_name(f"{node} {name}")
        out.mkdir(exist_ok=True)
        arguments = [str(ROOT / node), "-x", "--tb=long"]
        found = native_tests.run_tests(out, arguments, limit=limit, variables=names[name])
        lines = (out / "tests.log").read_text(errors="replace").splitlines()
        return found | {"words": [line[1:].strip() for line in lines if line.startswith("E ")][:WORDS]}

    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(run, names), strict=True))
    return node, {"kind": "test", "runs": found, "wrong": any(one["outcome"] != "passed" for one in found.values())}


def _layer_again(setting: runs.Setting, folder: Path, record: Mapping[str, Any]) -> tuple[str, runs.Record]:
    key = str(record["key"])
    found = _process(setting, folder, key, "--layer", json.dumps(record["case"]))
    return key, {"kind": "layer", "variants": found, "wrong": any(map(_is_wrong, found.values()))}


# What is read off


def _tables(records: runs.Records) -> list[str]:
    lines: list[str] = []
    for record in records.values():
        for key, found in record.get("found", {}).items():
            lines += ["", f"### {key}", "", *(_runs_table if found["kind"] == "test" else _variants_table)(found)]
    return lines


def _variants_table(found: runs.Record) -> list[str]:
    right = [name for name, record in found["variants"].items() if record["status"] == "ok"]
    others = {name: record for name, record in found["variants"].items() if record["status"] != "ok"}
    lines = [f"Right: {', '.join(right) or 'none'}."]
    if found.get("same_bits") is not None:
        lines += ["", "Twice the same bits." if found["same_bits"] else "Twice: different bits."]
    rows = []
    for name, record in others.items():
        results = record.get("results") or {"-": {}}
        for result, about in results.items():
            worst = about.get("worst", [{}])[0]
            element = f"{worst['at']}: {worst['got']:.6g}, not {worst['expected']:.6g}" if worst else "-"
            share = f"{about['wrong']} of {about['of']}" if about else "-"
            where = about.get("where") or record.get("message", "")[:200]
            ratio = "-" if about.get("ratio") is None else f"{about['ratio']:.4g}"
            rows.append([name, record["status"], result, share, where, ratio, element])
    if rows:
        headers = ["variant", "status", "result", "wrong elements", "where", "found / true", "the worst"]
        lines += ["", report.format_table(headers, rows)]
    return lines


def _runs_table(found: runs.Record) -> list[str]:
    lines = [f"- {name}: {one['outcome']}" for name, one in found["runs"].items()]
    words: list[str] = next((one["words"] for one in found["runs"].values() if one["words"]), [])
    return [*lines, *(["", "```", *words, "```"] if words else [])]


if __name__ == "__main__":
    sys.exit(main())
