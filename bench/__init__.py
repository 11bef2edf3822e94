"""Benchmarks of c3a_triton and its peers: `python -m bench.<subject>` from the repository root.

`python -m` puts the working directory on `sys.path`, and there our folder `kernels` shadows the published package of
that name, which transformers imports. So the root leaves the path before anything else is imported; the modules of
this package are still found through its own `__path__`.
"""

import contextlib
import importlib.util
import os
import sys
import time
from pathlib import Path

__all__ = ["ROOT", "STARTED"]

# By time.monotonic: before the imports that follow, which take long on a machine that has just started.
STARTED = time.monotonic()

ROOT = Path(__file__).resolve().parent.parent


def _without_root(path: list[str]) -> list[str]:
    return [entry for entry in path if Path(entry or ".").resolve() != ROOT]


def _put_checkout_on_path() -> None:
    """Make `import c3a_triton` work, here and in child processes, where the package is not installed.

    A benchmark machine may hold torch and triton and nothing else. The folder `kernels` has to appear inside the
    package, so `out/site/c3a_triton` is made of links to both.
    """
    site = ROOT / "out" / "site"
    package = site / "c3a_triton"
    package.mkdir(parents=True, exist_ok=True)
    sources = {entry.name: entry for entry in (ROOT / "c3a_triton").iterdir() if entry.name != "__pycache__"}
    sources["kernels"] = ROOT / "kernels"
    for name in {link.name for link in package.iterdir() if link.is_symlink()} - sources.keys():
        (package / name).unlink(missing_ok=True)
    for name, source in sources.items():
        with contextlib.suppress(FileExistsError):
            (package / name).symlink_to(source)
    sys.path.insert(0, str(site))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), inherited] if inherited else [str(site)])


sys.path[:] = _without_root(sys.path)
if importlib.util.find_spec("c3a_triton") is None:
    _put_checkout_on_path()
