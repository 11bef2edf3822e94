"""What docs/scale.md says of models that are past these machines."""

import bench_package  # noqa: F401
import pytest

from bench import ROOT, scale


def test_the_document_has_the_tables_that_the_command_writes() -> None:
    assert f"{scale.BEGIN}\n\n{scale.section()}\n\n{scale.END}" in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize(
    ("width", "b", "n_gpus", "widest"), [(1024, 128, 8, 128), (1024, 1024, 8, 1024), (24, 4, 5, 8)]
)
def test_the_blocks_that_a_part_reaches_into(width: int, b: int, n_gpus: int, widest: int) -> None:
    """24 over 5 is parts of 5: the second, from 5 to 10, reaches into the blocks from 4 to 12."""
    assert scale._covering(width, b, n_gpus) == widest


def test_bytes_against_a_ring_step_by_step() -> None:
    """A ring reduces in 2 (N − 1) steps, in each of which a GPU sends an Nth."""
    layer, tp, b = scale.Layer(8, (scale.Linear(8, 16, "colwise"),)), 4, 4
    reduced = 2 * (tp - 1) * (4 * 8 * 16 / b) / tp
    assert scale.adapter_traffic(layer, b, tp, 1) == scale.Traffic(0, 1, reduced)
    assert scale.adapter_traffic(layer, b, 1, 1) == scale.Traffic(0, 0, 0.0)
