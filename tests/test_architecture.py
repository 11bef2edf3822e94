"""The order of the house: a folder stands on those before it, a file imports no file that imports it, and the operator
needs nothing but torch, triton, einops and the standard library.
"""

import ast
import graphlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "c3a_triton"
# Rooms in their order: a room imports from itself and from those that it stands on, here named one by one.
GROUND = {"_public", "errors", "_ops"}
STANDS_ON = {
    "_public": set(),
    "_ops": set(),
    "errors": {"_public"},
    "kernels": set(),
    "operator": GROUND | {"kernels"},
    "files": GROUND,
    "bases": GROUND | {"files"},
    "adapters": GROUND | {"operator", "files", "bases"},
    "integrations": GROUND | {"operator", "files", "bases", "adapters"},
    "api": GROUND | {"operator", "files", "bases", "adapters", "integrations"},
}
STANDS_ON["benchmark"] = STANDS_ON["api"] | {"api"}
STANDS_ON["tuning"] = STANDS_ON["benchmark"] | {"benchmark", "__version__"}
STANDS_ON["__init__"] = STANDS_ON["tuning"] | {"tuning"}
STANDS_ON["commands"] = STANDS_ON["__init__"] | {"__version__"}
STANDS_ON["cli"] = STANDS_ON["commands"] | {"commands"}
STANDS_ON["__main__"] = {"cli"}
STANDS_ON["folder_merge"] = {"commands"}
FILES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
MOST_LINES = 600


def module_of(path: Path) -> str:
    """The module that a file is."""
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "c3a_triton" else ("c3a_triton", *relative.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, wherever in the file."""
    module = module_of(path)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(source, package) if node.level else source
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """The folder that a module is in, or the file itself if it is in none."""
    return [*module.split("."), "__init__"][1]


MODULES = {module_of(path): path for path in FILES}


def ours(path: Path) -> set[str]:
    """The package's own files that a file imports."""
    return {name for name in imports(path) if name in MODULES} - {"c3a_triton", module_of(path)}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_stands_on_those_below(module):
    room = room_of(module)
    names = imports(MODULES[module])
    rooms = {room_of(name) for name in names if name.startswith("c3a_triton.")}
    assert rooms - {room} <= STANDS_ON[room]


def test_no_circles():
    graph = {module: ours(path) for module, path in MODULES.items()}
    packages = {module for module, path in MODULES.items() if path.stem == "__init__"}
    # Whoever imports from a package's file imports the package, which has nothing in it.
    list(graphlib.TopologicalSorter({m: found - packages for m, found in graph.items()}).static_order())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_of_a_length_to_be_read(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_map_shows_every_file():
    """`docs/architecture.md` and `ls` agree."""
    content = (ROOT / "docs" / "architecture.md").read_text()
    told = {
        name for line in re.findall(r"^\| `[^|]*", content, re.MULTILINE) for name in re.findall(r"`([^`]+)`", line)
    }
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    assert told == {path.as_posix() for path in files if path.name != "__init__.py" or path.parent == Path()}


def test_every_package_is_installed():
    """Packages are listed in pyproject.toml, where a new one is easily forgotten."""
    content = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(r"^packages = (\[[^]]*\])", content, re.MULTILINE)[1])
    assert sorted(listed) == sorted([*(module_of(path) for path in FILES if path.name == "__init__.py")])


@pytest.mark.parametrize("path", sorted((PACKAGE / "operator").rglob("*.py")), ids=module_of)
def test_the_operator_stands_on_torch_triton_einops_and_the_standard_library(path):
    roots = {module.split(".")[0] for module in imports(path)}
    assert roots <= {"torch", "triton", "einops", "c3a_triton", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted((PACKAGE / "operator").rglob("*.py")), ids=module_of)
def test_the_operator_knows_of_no_library_that_brings_it_tensors(path):
    """What DeepSpeed or accelerate do with a parameter is for `bases` to know."""
    assert not re.search(r"deepspeed|ds_id|zero-3|accelerate\b|_hf_hook", path.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=module_of)
def test_kernels_are_triton_only(path):
    roots = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names)
    assert roots <= {"triton", "c3a_triton"}


def test_the_root_does_not_shadow_the_published_kernels_package(tmp_path):
    """transformers imports names from the published package `kernels`; from the repository root it must get them."""
    code = "import kernels; print(kernels.get_kernel, kernels.__file__); import c3a_triton.kernels"
    published = tmp_path / "kernels" / "__init__.py"
    published.parent.mkdir()
    published.write_text("get_kernel = 'published'")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert result.stdout.split() == ["published", str(published)]


def test_imports_are_light_and_our_folder_shadows_nothing():
    """`import c3a_triton` takes nothing along; its names and the tuner neither Triton nor an optional package.

    And transformers, whose own imports ask for the published package `kernels`, works in the repository's root.
    """
    heavy = ("triton", "transformers", "peft", "accelerate", "scipy", "matplotlib", "rich", "numpy.testing")
    code = f"""
import sys
import c3a_triton
print([name for name in ("torch", "regex", "safetensors", "importlib.metadata") if name in sys.modules])
import torch
before = set(sys.modules)
from c3a_triton import *
import c3a_triton.commands.autotune
print([name for name in {heavy!r} if name in set(sys.modules) - before])
import importlib.util
if importlib.util.find_spec("transformers"):
    import transformers, c3a_triton.kernels
    from transformers import LlamaForCausalLM
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.split("\n") == ["[]", "[]", ""], result.stderr
    assert result.returncode == 0, result.stderr


def test_custom_ops_are_there_for_who_loads_an_exported_program():
    code = """
import sys, torch
before = set(sys.modules)
import c3a_triton
print(torch.ops.c3a_triton.linear, torch.ops.c3a_triton.weight_grad_rows, "triton" in set(sys.modules) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["c3a_triton.linear", "c3a_triton.weight_grad_rows", "False"], result.stderr


def test_a_checkout_that_is_not_installed_says_so():
    """On the path but not installed there is no `c3a_triton.kernels`: an error with the remedy, not a slow path."""
    code = """
import importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__name__", type(f).__name__).lower()]
sys.path = [p for p in sys.path if "__editable__" not in p]
sys.path.insert(0, ".")
import c3a_triton, torch
try:
    c3a_triton.circulant_linear(torch.randn(1, 4), torch.randn(1, 1, 4))
except c3a_triton.BackendError as error:
    print(error)
"""
    if importlib.util.find_spec("c3a_triton.kernels").origin.startswith(str(Path(sys.prefix))):
        pytest.skip("installed as a wheel: the checkout cannot be told from the installation")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "pip install" in result.stdout
