"""Triton kernels for block-circulant products: Triton only, no torch. Installed as `c3a_triton.kernels`."""

if __name__ == "kernels":
    # Imported under this name the folder was found through the repository root, in place of the published package
    # `kernels`, which transformers imports from where it is installed: hand over to it. Where it is not, transformers
    # takes a module without a version for "not available", so there is nothing to do.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != root])
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = published = module_from_spec(spec)
        spec.loader.exec_module(published)
