"""Under which name torch knows this package's custom ops; a copy for the hub has another name for its own."""

import torch

__all__ = ["add_op_namespace_prefix", "ops"]

NAMESPACE = "c3a_triton"

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of one of this package's ops."""
    return f"{NAMESPACE}::{op_name}"
