"""A pytest plugin: records what Triton would compile for the launches of a session, as `bench.precompile` reads it.

    PYTHONPATH=tests pytest -p record_launches --specialisations FILE ...

Launches are made in the interpreter as without it. FILE is appended to; each process of pytest-xdist has its own, named
after the process.
"""

from contextlib import ExitStack
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--specialisations", type=Path, required=True, metavar="FILE", help="where they are appended")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recording(config), "recording")


class _Recording:
    def __init__(self, config: pytest.Config) -> None:
        path = config.getoption("--specialisations")
        worker = getattr(config, "workerinput", {}).get("workerid")
        self.path = path if worker is None else path.with_stem(f"{path.stem}-{worker}")
        self.stack = ExitStack()

    def pytest_sessionstart(self) -> None:
        import bench_package  # noqa: F401

        from bench import specialisations

        file = self.stack.enter_context(self.path.open("a", encoding="utf-8"))
        self.recorder = self.stack.enter_context(specialisations.recorded(file=file))

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        self.recorder.purpose = f"{item.path.stem}::{item.originalname}"

    def pytest_sessionfinish(self) -> None:
        self.stack.close()
