"""Every kernel compiled ahead of time for three card generations: no spills, within shared memory, on tensor cores.

Needs no GPU. The interpreter replaces the compiler in a whole process, so the compiling happens in others
(aot_worker.py), with an empty cache of their own. `NIGHTLY=1` compiles every case for every card; otherwise those that
are no neighbours of others for one card, and a case or two of each kernel for the others.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from c3a_triton.operator.launch.tiles import SHARED_MEMORY, decode_tile

CARDS = ("sm_80", "sm_90", "sm_100")
MOST = "sm_90"  # for which more is compiled every time
MMA = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
PRODUCTS = ("decode_kernel", "table_product_kernel", "hankel_kernel", "diagonal_sums_kernel", "block_sums_kernel")
GROUPED = ("grouped_hankel_kernel", "grouped_product_kernel")
SPECTRAL = (
    "spectra_kernel",
    "mix_kernel",
    "outer_kernel",
    "results_kernel",
    "routed_mix_kernel",
    "routed_outer_kernel",
)


def compile_all(card: str, cache: Path) -> list[dict]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    worker = Path(__file__).with_name("aot_worker.py")
    command = [sys.executable, str(worker), card]
    command += [] if os.environ.get("NIGHTLY") else ["few" if card == MOST else "once"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=7200)
    assert run.returncode == 0, f"{card}: {run.stderr[-4000:]}"
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What the compiler made of every kernel, by card."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {card: pool.submit(compile_all, card, tmp_path_factory.mktemp(card)) for card in CARDS}
        return {card: job.result() for card, job in jobs.items()}


def small(row: dict) -> bool:
    """Whether the tile is too small for the instructions of a whole warp group, so that each warp multiplies alone."""
    few = ("product bfloat16 40 4096 256", "weight_grad bfloat16 8192 3072 96")
    # The gradient of w has a matrix [2·out_blocks, 2·in_blocks] per slot, and a w of a stack may have few rows.
    small_slots = row["kernel"] in ("outer_kernel", "routed_outer_kernel", "routed_mix_kernel") and row["rows"] < 64
    one_warp = ("hankel_kernel", "decode_kernel", "grouped_hankel_kernel")
    return row["kernel"] in one_warp or row["case"] in few or small_slots


def one_step(row: dict) -> bool:
    """Whether the sum is over in one step, so that there is nothing to copy ahead of its use."""
    return row["kernel"] in SPECTRAL and row["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_resources(compiled: dict[str, list[dict]], card: str) -> None:
    rows = compiled[card]
    others = {"table_kernel", "sum_partials_kernel", "expand_kernel", "fold_sums_kernel", "route_tiles_kernel"}
    assert {row["kernel"] for row in rows} == {*others, *PRODUCTS, *GROUPED, *SPECTRAL}
    assert not [row for row in rows if row["stack"] or row["local"]], "registers are spilled"
    assert not [row for row in rows if row["shared"] > SHARED_MEMORY[card]], "more shared memory than the card has"


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_main_loops(compiled: dict[str, list[dict]], card: str) -> None:
    rows = [row for row in compiled[card] if row["kernel"] in (*PRODUCTS, *GROUPED, *SPECTRAL)]
    slow = [row for row in rows if not row["mma.sync" if small(row) else MMA[card]]]
    assert not slow, "products without tensor cores"
    # The Hankel matrix is gathered two bytes at a time: no asynchronous copy carries that, but it does carry w.
    loops = [row for row in rows if not one_step(row)]
    assert not [row for row in loops if not row["cp.async.c"]], "operands are not copied ahead of their use"


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_decoding_reads_the_weight_sixteen_bytes_at_a_time(compiled: dict[str, list[dict]], card: str) -> None:
    rows = [row for row in compiled[card] if row["kernel"] == "decode_kernel"]
    assert rows
    for row in rows:
        _, _, n_tokens, _, _, b = row["case"].split()
        tile = decode_tile(int(n_tokens), int(b))
        # Tiles of W and x in bytes, per thread; once per stage, the last of them in the loop.
        per_stage = 2 * tile.block_i * (tile.block_o + 16) / (32 * tile.num_warps)
        assert row["cp.async.cg"] * 16 >= tile.num_stages * per_stage, row
        assert row["shared"] <= min(SHARED_MEMORY.values()), row


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_what_the_last_program_adds_up_is_ordered_by_the_one_count(compiled: dict[str, list[dict]], card: str) -> None:
    counting = [row for row in compiled[card] if row["atom.global"]]
    assert [row["case"] for row in counting] == ["decode bfloat16 1 4096 1024 128"]
    assert [(row["atom.global"], row["ordered"]) for row in counting] == [(1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_grouped_kernels_read_w_sixteen_bytes_at_a_time(compiled: dict[str, list[dict]], card: str) -> None:
    """An address from a table says nothing about alignment unless the kernel does; an index of a stack does."""
    hankel = [row for row in compiled[card] if row["kernel"] == "grouped_hankel_kernel"]
    rows = [row for row in hankel if " 256" in row["case"] or row["case"].startswith("routed")]
    assert {row["case"].split()[0] for row in rows} == {"grouped", "routed"}
    assert all(row["cp.async.cg"] for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_kernels_that_start_early_wait_before_they_touch_memory(compiled: dict[str, list[dict]], card: str) -> None:
    """Programmatic dependent launch: what the launch before writes is there only after the wait."""
    early = {row["kernel"]: row["waits_first"] for row in compiled[card] if "waits_first" in row}
    assert early == ({} if card == "sm_80" else dict.fromkeys(SPECTRAL, True))
