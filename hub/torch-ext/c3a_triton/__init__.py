"""C3A's block-circulant operator (arXiv 2407.19342), as the hub's kernel loader takes it: functions and one layer."""

from . import layers
from .operator.calls import c3a_linear, circulant_linear
from .operator.dense import circulant_matrix
from .operator.rows import c3a_linear_rows

__all__ = ["c3a_linear", "c3a_linear_rows", "circulant_linear", "circulant_matrix", "layers"]
