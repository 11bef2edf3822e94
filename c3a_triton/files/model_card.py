"""The model card beside an adapter: `README.md`, whose head tells the hub what the folder is."""

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from .atomic import replace_file

__all__ = ["CARD_NAME", "write_model_card"]

CARD_NAME = "README.md"
_VERSIONS = "### Framework versions"


def write_model_card(
    directory: str | os.PathLike[str],
    *,
    library_name: str,
    base_model: str | None,
    tags: Iterable[str],
    pipeline_tag: str | None,
) -> None:
    """Write an adapter's model card, or bring the one that is there up to date, as PEFT does.

    What others wrote in it stays: text, tags and whatever else its head says. A card that says all of this already is
    not written again, and without huggingface_hub, which knows the form, none is.

    Args:
        directory: the adapter's folder.
        library_name: by what the hub says that it is loaded.
        base_model: where the base model comes from; a folder of this machine means nothing to others and is left out.
        tags: what it is found by.
        pipeline_tag: its task, where the card says none.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
        from yaml import YAMLError  # type: ignore[import-untyped]
    except ImportError:
        return
    path = Path(directory) / CARD_NAME
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
        of_hub = base_model if base_model and not Path(base_model).is_dir() else None
        known = {*tags, *(() if of_hub is None else [f"base_model:adapter:{of_hub}"])}
        card.data["tags"] = sorted({*(card.data.get("tags") or ()), *known})
    except (ValueError, TypeError, OSError, YAMLError) as error:
        warnings.warn(f"{path} is no model card and is left as it is: {error}", stacklevel=3)
        return
    card.data["library_name"] = library_name
    if of_hub is not None:
        card.data["base_model"] = of_hub
    if pipeline_tag is not None and not card.data.get("pipeline_tag"):
        card.data["pipeline_tag"] = pipeline_tag
    lines = card.text.splitlines()
    package = sys.modules[__name__.partition(".")[0]]
    if (version := f"- {package.__name__} {package.__version__}") not in lines:
        if _VERSIONS in lines:
            lines.insert(lines.index(_VERSIONS) + 2, version)
        else:
            lines += [_VERSIONS, "", version]
        card.text = ("\r\n" if "\r\n" in card.text else "\n").join(lines)
    content = str(card).encode()
    if not path.exists() or path.read_bytes() != content:
        replace_file(path, content)
