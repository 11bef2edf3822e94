"""Lay the operators out for the hub's kernel loader: `python hub/assemble.py DIR` (Python 3.11 or later).

    DIR/build.toml, DIR/torch-ext/c3a_triton/     for the hub's builder, which adds `_ops.py` and the metadata itself
    DIR/build/torch-cpu/, DIR/build/torch-cuda/   the same files with both, as the `kernels` package loads them

The sources are those of the package: the folders `operator` and `kernels`, and the two files that they stand on.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "hub"
STANDS_ON = ("_public.py", "errors.py")  # and _ops.py


def sources() -> dict[str, bytes]:
    """Path in the kernel → content, without `_ops.py`."""
    package = ROOT / "c3a_triton"
    own = HUB / "torch-ext" / "c3a_triton"
    found = {path.relative_to(own): path for path in own.glob("*.py")}
    found |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").glob("*.py")}
    found |= {path.relative_to(package): path for path in (package / "operator").rglob("*.py")}
    found |= {Path(name): package / name for name in STANDS_ON}
    return {path.as_posix(): found[path].read_bytes() for path in sorted(found)}


def ops_module(namespace: str) -> bytes:
    """`_ops.py` with another namespace."""
    source = (ROOT / "c3a_triton" / "_ops.py").read_text()
    changed = source.replace('NAMESPACE = "c3a_triton"', f'NAMESPACE = "{namespace}"')
    if changed == source:
        raise SystemExit("c3a_triton/_ops.py has no line that sets NAMESPACE")
    return changed.encode()


def metadata(general: dict[str, Any], backend: str, identifier: str, files: dict[str, bytes]) -> bytes:
    """The kernel's `metadata.json`: a name of its own for every content, and a digest of every file."""
    digests = {path: base64.b64encode(hashlib.sha256(files[path]).digest()).decode() for path in sorted(files)}
    fields = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": general["python-depends"],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(fields, indent=2).encode() + b"\n"


def write(directory: Path, files: dict[str, bytes]) -> None:
    """Write files below a directory, which then holds nothing else."""
    shutil.rmtree(directory, ignore_errors=True)
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)


def main(directory: Path) -> None:
    """Assemble the kernel in `directory`."""
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    files = sources()
    unique = hashlib.sha256(b"".join(path.encode() + files[path] for path in sorted(files))).hexdigest()[:7]
    write(directory / "torch-ext" / "c3a_triton", files)
    (directory / "build.toml").write_bytes((HUB / "build.toml").read_bytes())
    for backend in general["backends"]:
        identifier = f"_c3a_triton_{backend}_{unique}"
        variant = files | {"_ops.py": ops_module(identifier)}
        described = {"metadata.json": metadata(general, backend, identifier, variant)}
        write(directory / "build" / f"torch-{backend}", variant | described)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
