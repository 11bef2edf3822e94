"""`c3a-triton inspect`: what can be adapted in a model, at what cost; or what an adapter is."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c3a_triton.adapters.file_targets import chosen_by_file
from c3a_triton.adapters.report import format_bytes, format_table
from c3a_triton.adapters.targets import find_targets
from c3a_triton.bases.structure import load_structure
from c3a_triton.files.block_sizes import valid_block_sizes
from c3a_triton.files.checkpoint import KERNEL_SUFFIX, WEIGHTS_NAME, AdapterFile, config_state, read_adapter
from c3a_triton.files.config import CONFIG_NAME, C3AConfig

from .options import module_choice, parameter_choice, print_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """The command."""
    if (Path(args.path) / CONFIG_NAME).exists():
        document = _adapter_document(read_adapter(args.path))
        text = _adapter_text
    else:
        targets, excluded = module_choice(args.target_modules), module_choice(args.exclude_modules)
        named = parameter_choice(args.target_parameters)
        document = _model_document(args.path, targets or "all-linear", named, excluded)
        text = _model_text
    if args.json:
        print_json(document)
    else:
        print(text(document))
    return 0


# Groups of layers that are alike


@dataclass(frozen=True)
class _Layer:
    name: str
    in_features: int
    out_features: int
    stack: int = 0  # how many matrices of these sizes there are, where it is a parameter that stacks them
    divided: tuple[int, int] = (0, 0)  # what block sizes have to divide
    block_size: int = 0
    chosen_by: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers of one group share: the name up to numbers, and everything else."""
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", self.name)
        return pattern, self.in_features, self.out_features, self.stack, self.divided, self.block_size, self.chosen_by


def _grouped(layers: Iterable[_Layer]) -> list[tuple[str, list[_Layer]]]:
    groups: dict[tuple[object, ...], list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return [(str(kind[0]), members) for kind, members in groups.items()]


# A model


def _model_document(
    path: str, targets: list[str] | str, parameters: list[str] | str | None, excluded: list[str] | str | None
) -> dict[str, Any]:
    model = load_structure(path)
    # Every layer takes b = 1, so that no layer is refused for its size.
    config = C3AConfig(block_size=1, target_modules=targets, target_parameters=parameters, exclude_modules=excluded)
    layers = []
    for target in find_targets(model, config):
        sizes = target.sizes
        layers.append(_Layer(target.name, sizes.in_features, sizes.out_features, sizes.stack, sizes.divided))
    groups = [
        {
            "name": name,
            "layers": len(members),
            "in_features": members[0].in_features,
            "out_features": members[0].out_features,
            "stack": members[0].stack,
            "valid_block_sizes": valid_block_sizes(*members[0].divided),
        }
        for name, members in _grouped(layers)
    ]
    return {
        "model": path,
        "class": type(model).__name__,
        "model_type": getattr(model.config, "model_type", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "target_modules": targets,
        "target_parameters": parameters,
        "exclude_modules": excluded,
        "layers": len(layers),
        "groups": groups,
        "block_sizes": _block_sizes(groups),
    }


def _block_sizes(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each block size that any layer takes: the layers that take it, and what they cost."""
    rows = []
    for b in sorted({b for group in groups for b in group["valid_block_sizes"]}):
        fitting = [group for group in groups if b in group["valid_block_sizes"]]
        matrices = [g["layers"] * max(g["stack"], 1) for g in fitting]
        sizes = [(n, g["in_features"], g["out_features"]) for n, g in zip(matrices, fitting, strict=True)]
        parameters = sum(n * n_in * n_out // b for n, n_in, n_out in sizes)
        per_rank = sum(n * (n_in + n_out) for n, n_in, n_out in sizes)
        rows.append(
            {
                "block_size": b,
                "layers": sum(group["layers"] for group in fitting),
                "parameters": parameters,
                "lora_rank": parameters / per_rank,
                "adapter_bytes": 4 * parameters,
            }
        )
    return rows


def _model_text(document: dict[str, Any]) -> str:
    groups: list[tuple[str, ...]] = [("layers", "count", "in", "out", "valid block sizes")]
    for group in document["groups"]:
        sizes = ", ".join(map(str, group["valid_block_sizes"]))
        groups.append((group["name"], str(group["layers"]), *_widths(group), sizes))
    sizes_table: list[tuple[str, ...]] = [("b", "layers", "parameters", "of the model", "as LoRA of rank", "file")]
    for row in document["block_sizes"]:
        share = f"{100 * row['parameters'] / document['parameters']:.3g} %"
        counts = (str(row["block_size"]), f"{row['layers']} of {document['layers']}", f"{row['parameters']:,}")
        sizes_table.append((*counts, share, f"{row['lora_rank']:.3g}", format_bytes(row["adapter_bytes"])))
    return "\n".join(
        [
            f"{document['class']}, {document['parameters']:,} parameters; "
            f"target_modules={document['target_modules']!r}"
            + (f", target_parameters={document['target_parameters']!r}" if document["target_parameters"] else ""),
            "",
            format_table(groups, {1, 2, 3}),
            "",
            "With one block size for every layer that takes it:",
            "",
            format_table(sizes_table, {0, 2, 3, 4, 5}),
        ]
    )


def _widths(group: dict[str, Any]) -> tuple[str, str]:
    """in and out; of a stack with the number of its matrices."""
    stack = f"{group['stack']} × " if group["stack"] else ""
    return str(group["in_features"]), f"{stack}{group['out_features']}"


# An adapter


def _adapter_document(file: AdapterFile) -> dict[str, Any]:
    chosen_by = chosen_by_file(file)
    layers = [_file_layer(file, name, b, chosen_by(name)) for name, b in file.block_sizes.items()]
    kernels = sum(file.tensors[name + KERNEL_SUFFIX].numel() for name in file.block_sizes)
    return {
        "adapter": str(file.path),
        "base_model": file.config.base_model_name_or_path,
        "layers": len(layers),
        "parameters": kernels,
        "other_parameters": sum(tensor.numel() for tensor in file.tensors.values()) - kernels,
        "weights_bytes": (file.path / WEIGHTS_NAME).stat().st_size,
        "config_state": config_state(file.path),
        "config": file.config.to_dict(),
        "groups": [
            {
                "name": name,
                "layers": len(members),
                "in_features": members[0].in_features,
                "out_features": members[0].out_features,
                "stack": members[0].stack,
                "block_size": members[0].block_size,
                "chosen_by": members[0].chosen_by,
                "parameters": sum(file.tensors[member.name + KERNEL_SUFFIX].numel() for member in members),
            }
            for name, members in _grouped(layers)
        ],
    }


def _file_layer(file: AdapterFile, name: str, b: int, chosen_by: str) -> _Layer:
    *stack, out_blocks, in_blocks, _ = file.tensors[name + KERNEL_SUFFIX].shape
    return _Layer(name, in_blocks * b, out_blocks * b, stack[0] if stack else 0, (0, 0), b, chosen_by)


def _adapter_text(document: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("layers", "count", "in", "out", "b", "chosen by", "parameters")]
    for group in document["groups"]:
        numbers = (str(group["layers"]), *_widths(group), str(group["block_size"]))
        rows.append((group["name"], *numbers, group["chosen_by"], f"{group['parameters']:,}"))
    lines = [
        f"C3A adapter for {document['base_model'] or 'a model that it does not name'}",
        f"{document['layers']} layers, {document['parameters']:,} parameters; "
        f"{WEIGHTS_NAME} {format_bytes(document['weights_bytes'])}",
        f"{CONFIG_NAME}: {document['config_state']}",
    ]
    if document["other_parameters"]:
        lines.append(f"{document['other_parameters']:,} further values (biases, modules_to_save, rows of tokens)")
    return "\n".join([*lines, "", format_table(rows, {1, 2, 3, 4, 6})])
