"""Makes `from bench import ...` work without the repository root on the path."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if "bench" not in sys.modules:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    package = sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
