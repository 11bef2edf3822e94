"""The order of the house: every file imports only from those before it, the core nothing else but torch and triton."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "_public",
    "errors",
    "hooks",
    "config",
    "patterns",
    "reference",
    "traced",
    "fourier",
    "tiles",
    "launch",
    "spectra",
    "launch_fft",
    "launch_grouped",
    "tuned",
    "dispatch",
    "_ops",
    "ops",
    "ops_rows",
    "quantized",
    "probe",
    "linear_like",
    "names",
    "merge_state",
    "layer",
    "conv",
    "embedding",
    "modules_to_save",
    "checkpoint",
    "combine",
    "targets",
    "beside",
    "renaming",
    "report",
    "tying",
    "watched",
    "pretrained",
    "row_names",
    "ownership",
    "wrapping",
    "untying",
    "samples",
    "manager",
    "learning_rates",
    "explanation",
    "integrations",
    "api",
    "machine",
    "structure",
    "folder_merge",
    "benchmark",
    "commands",
    "tuning",
    "__init__",
    "cli",
    "__main__",
]
TUNING = [
    "groups",
    "costs",
    "measurement",
    "tile_search",
    "solver",
    "outcome",
    "settings",
    "plots",
    "page",
    "tuner",
    "commands",
]
CORE = {*ORDER[: ORDER.index("ops_rows") + 1]} - {"hooks", "config", "patterns"}
LAUNCHERS = {"launch", "launch_grouped"}
# A package has one place; its files also import from each other.
PACKAGES = sorted(path.parent.name for path in (ROOT / "c3a_triton").glob("*/__init__.py"))
PACKAGE_FILES = sorted(path for name in PACKAGES for path in (ROOT / "c3a_triton" / name).glob("*.py"))
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


def imports(path: Path, package: str) -> set[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level == 1 else str(node.module)
            assert node.level <= 1, f"{path}: {ast.unparse(node)}"
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    """Files of the package among imported names."""
    known = {*ORDER, "kernels", "integrations"}
    return {name.split(".")[1] for name in names if name.startswith("c3a_triton.")} & known


def test_every_file_has_its_place():
    assert {path.stem for path in (ROOT / "c3a_triton").glob("*.py")} | set(PACKAGES) == set(ORDER)


def test_every_package_is_installed():
    """Packages are listed in pyproject.toml, where a new one is easily forgotten."""
    content = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(r"^packages = (\[[^]]*\])", content, re.MULTILINE)[1])
    assert sorted(listed) == sorted(["c3a_triton", *(f"c3a_triton.{name}" for name in [*PACKAGES, "kernels"])])


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_files_of_packages_import_only_from_those_before(path):
    package = path.parent.name
    allowed = set(ORDER[: ORDER.index(package) + 1])
    assert ours(imports(path, f"c3a_triton.{package}")) <= allowed


@pytest.mark.parametrize("name", [name for name in ORDER if name not in PACKAGES])
def test_files_import_only_from_those_before(name):
    allowed = set(ORDER[: ORDER.index(name)]) | ({"kernels"} if name in LAUNCHERS else set())
    assert ours(imports(ROOT / "c3a_triton" / f"{name}.py", "c3a_triton")) <= allowed


def test_every_file_of_the_tuner_has_its_place():
    assert {path.stem for path in (ROOT / "c3a_triton" / "tuning").glob("*.py")} == {*TUNING, "__init__"}


@pytest.mark.parametrize("name", TUNING)
def test_files_of_the_tuner_import_only_from_those_before(name):
    names = imports(ROOT / "c3a_triton" / "tuning" / f"{name}.py", "c3a_triton.tuning")
    own = {other.split(".")[2] for other in names if other.startswith("c3a_triton.tuning.")} & set(TUNING)
    assert own <= set(TUNING[: TUNING.index(name)])


def test_what_the_tuner_needs_is_imported_when_it_is_needed():
    heavy = ("triton", "transformers", "peft", "scipy", "matplotlib", "rich")
    code = f"""
import sys, torch
before = set(sys.modules)
import c3a_triton.tuning.commands
print([name for name in {heavy!r} if name in set(sys.modules) - before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_stands_on_torch_triton_and_the_standard_library(name):
    names = imports(ROOT / "c3a_triton" / f"{name}.py", "c3a_triton")
    roots = {module.split(".")[0] for module in names}
    foreign = roots - set(sys.stdlib_module_names) - {"torch", "triton", "c3a_triton"}
    assert not foreign
    assert ours(names) <= CORE | {"kernels"}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_triton_only(name):
    names = imports(ROOT / "kernels" / f"{name}.py", "c3a_triton.kernels")
    roots = {module.split(".")[0] for module in names} - set(sys.stdlib_module_names)
    assert roots <= {"triton", "c3a_triton"}
    assert all(module.startswith("c3a_triton.kernels") for module in names if module.startswith("c3a_triton"))


def test_import_is_light():
    """`import c3a_triton` takes none of the optional packages along, nor Triton."""
    heavy = ("triton", "transformers", "peft", "accelerate", "matplotlib", "numpy.testing")
    code = f"""
import sys, torch
before = set(sys.modules)
import c3a_triton
print([name for name in {heavy!r} if name in set(sys.modules) - before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"


def test_the_root_does_not_shadow_the_published_kernels_package(tmp_path):
    """transformers imports names from the published package `kernels`; from the repository root it must get them."""
    code = "import kernels; print(kernels.get_kernel, kernels.__file__); import c3a_triton.kernels"
    published = tmp_path / "kernels" / "__init__.py"
    published.parent.mkdir()
    published.write_text("get_kernel = 'published'")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert result.stdout.split() == ["published", str(published)]


def test_transformers_imports_from_the_root():
    pytest.importorskip("transformers")
    code = "import transformers, c3a_triton.kernels; from transformers import LlamaForCausalLM, LlamaConfig"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


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
