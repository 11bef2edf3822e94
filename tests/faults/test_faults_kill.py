"""A process that is killed while it writes: each file is the former or the new one, whole; a mixed pair is reported.

`NIGHTLY=1` kills at a hundred random moments, beside every step in the file system; otherwise at a few.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

KILLS = 100 if os.environ.get("NIGHTLY") else 5
WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    if not hasattr(os, "fork"):
        pytest.fail("this needs os.fork")
    command = [sys.executable, str(WORKER), str(tmp_path_factory.mktemp("kills")), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def test_save_pretrained(seen: dict[str, dict[str, int]]) -> None:
    assert {"former", "new", "nothing", "mixed, reported"} <= seen["save"].keys()
    assert seen["save"]["killed"] > 3 * KILLS


def test_merge(seen: dict[str, dict[str, int]]) -> None:
    assert "former" in seen["merge"]
    assert seen["merge"]["killed"] > KILLS


def test_tuned_table(seen: dict[str, dict[str, int]]) -> None:
    assert "former" in seen["tuned"]
    assert seen["tuned"]["killed"] > KILLS
