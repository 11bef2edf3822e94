"""The operators as the published `kernels` package loads them: offline, from a folder, without this package."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="hub/assemble.py reads TOML (Python 3.11)")


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "hub" / "assemble.py", directory], check=True)
    return directory


def run(code: str, hub: Path, **more: str) -> None:
    """Run code in a process of its own, offline, with the folder as `hub`."""
    code = f"from pathlib import Path\nimport sys, torch\nhub = Path({str(hub)!r})\ntorch.manual_seed(0)\n{code}"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **more}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=hub)
    assert result.returncode == 0, result.stderr[-4000:]


def test_it_is_copied_whole_and_stands_on_its_own(assembled: Path) -> None:
    variants = [assembled / "build" / f"torch-{backend}" for backend in ("cpu", "cuda")]
    for package in (*variants, assembled / "torch-ext" / "c3a_triton"):
        for path in package.rglob("*.py"):
            name = path.relative_to(package)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    roots = {str(node.module).split(".")[0]}
                else:
                    continue
                assert roots <= {"torch", "triton", "einops", *sys.stdlib_module_names}, name
            origin = ROOT / name if name.parts[0] == "kernels" else ROOT / "c3a_triton" / name
            if str(name) not in ("__init__.py", "layers.py", "_ops.py"):
                assert path.read_bytes() == origin.read_bytes()
    # The hub's builder writes this one.
    assert not (assembled / "torch-ext" / "c3a_triton" / "_ops.py").exists()


def test_it_is_what_the_loader_and_the_builder_read(assembled: Path) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert [str(backend) for backend in Build.open(assembled).general.backends] == ["cpu", "cuda"]
    for backend in ("cpu", "cuda"):
        variant = assembled / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert metadata.id.startswith(f"_c3a_triton_{backend}_")
        assert metadata.python_depends == ["einops"]
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


LAYER = """
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

@use_kernel_forward_from_hub("C3ALinear")
class Layer(torch.nn.Module):
    def __init__(self, *adapters):
        super().__init__()
        self.base_layer = torch.nn.Linear(12, 8)
        self.c3a_kernel = torch.nn.ParameterDict({name: torch.randn(8 // b, 12 // b, b) for name, b in adapters})
        self.active_adapters, self.disable_adapters, self.merged = ["a", "b", "elsewhere"], False, False

    def forward(self, x, *args, **kwargs):
        raise NotImplementedError

model = torch.nn.Sequential(Layer(("a", 4), ("b", 2)), torch.nn.ReLU())
repository = LocalLayerRepository(hub, layer_name="C3ALinear")
with use_kernel_mapping({"C3ALinear": {"cpu": repository}}):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
layer = model[0]
x = torch.randn(3, 12)
expected = layer.base_layer(x) + sum(x @ dense(w).T for w in layer.c3a_kernel.values())
torch.testing.assert_close(model(x), expected.relu())
layer.disable_adapters = True
torch.testing.assert_close(layer(x), layer.base_layer(x))
"""
DENSE = """
def dense(w):
    m, n, b = w.shape
    return torch.stack([w.roll(j, -1) for j in range(b)], 1).reshape(m * b, n * b) / (n * b)
"""


def test_alone_and_beside_the_package(assembled: Path) -> None:
    """By path and by name, each backend against the definition, and as a layer's forward; `c3a_triton` is not there.

    Then it is, with ops of its own; and PEFT's layers take the hub's forward. In one process: importing takes long.
    """
    code = f"""
sys.modules["c3a_triton"] = None
import kernels
{DENSE}
hub_copy = kernels.get_local_kernel(hub)
assert kernels.get_kernel("someone/c3a-triton", version=1) is hub_copy
x, w = torch.randn(5, 24, requires_grad=True), torch.randn(4, 6, 4)
weight, bias = torch.randn(16, 24), torch.randn(16)
for backend in ("auto", "torch", "reference", "direct", "expand"):
    torch.testing.assert_close(hub_copy.circulant_linear(x, w, backend=backend), x @ dense(w).T)
y = hub_copy.c3a_linear_rows(x, weight, bias, [w, 2 * w], [1, -1, 0, 0, 1], backend="direct")
factor = torch.tensor([2.0, 0, 1, 1, 2])[:, None]
torch.testing.assert_close(y, x @ weight.T + bias + factor * (x @ dense(w).T))
compiled = torch.compile(hub_copy.circulant_linear, backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x, w), x @ dense(w).T)
{LAYER}
assert [name for name in sys.modules if name.startswith("c3a_triton")] == ["c3a_triton"]

del sys.modules["c3a_triton"]
import c3a_triton
x, w = torch.randn(5, 24), torch.randn(4, 6, 4)
torch.testing.assert_close(hub_copy.circulant_linear(x, w), c3a_triton.circulant_linear(x, w))
from importlib import import_module
own, theirs = (import_module(f"{{name}}._ops") for name in ("c3a_triton", hub_copy.__name__))
assert own.add_op_namespace_prefix("linear") == "c3a_triton::linear"
assert theirs.add_op_namespace_prefix("linear") == hub_copy.__name__ + "::linear"
assert own.ops.linear is not theirs.ops.linear

if {importlib.util.find_spec("peft") is not None}:
    import peft
    from kernels import replace_kernel_forward_from_hub
    from peft.tuners.c3a.layer import C3ALinear
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 24))
    model = peft.get_peft_model(model, peft.C3AConfig(target_modules=["0", "1"], block_size=4, init_weights="gaussian"))
    expected = model(x)
    replace_kernel_forward_from_hub(C3ALinear, "C3ALinear")
    with use_kernel_mapping({{"C3ALinear": {{"cpu": LocalLayerRepository(hub, layer_name="C3ALinear")}}}}):
        kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
"""
    run(code, assembled, LOCAL_KERNELS=f"someone/c3a-triton={assembled}")
