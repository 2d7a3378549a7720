"""Make `torchlathe` importable from the source tree when it is not installed."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

if importlib.util.find_spec("torchlathe") is None:
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "torchlathe", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["torchlathe"] = module
    spec.loader.exec_module(module)

# What other runs and the tests of another process measured must not decide what is tested.
os.environ["TORCHLATHE_CACHE"] = tempfile.mkdtemp(prefix="torchlathe-tests-")
atexit.register(shutil.rmtree, os.environ["TORCHLATHE_CACHE"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for work must not keep another process from its own
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts from today's output")


@pytest.fixture
def golden(request):
    """Compare text with tests/golden/<test file>/<test name>.txt; `--update-golden` rewrites the file."""
    folder = Path(__file__).parent / "golden" / request.node.path.stem
    path = folder / f"{request.node.name}.txt"

    def check(text: str) -> None:
        if request.config.getoption("--update-golden"):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        assert path.exists(), f"no golden text at {path}: run pytest --update-golden and read the new file"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return check


@pytest.fixture
def ask():
    """Ask a pass the questions that every pass must answer; returns (program before, program after, sites or refusal).

    Checks that a rewritten program is well formed, gives the model's answers up to rounding, and that a
    second run of the pass finds nothing more to do.
    """
    import torch
    from torch.utils import _pytree as pytree

    from torchlathe import targets
    from torchlathe.passes.base import Context, Refusal
    from torchlathe.passes.capture import capture
    from torchlathe.passes.verify import difference, well_formed

    def run(rewrite, model, args, kwargs=None, dynamic_shapes=None):
        before = capture(model.eval(), args, kwargs, dynamic_shapes=dynamic_shapes)
        after = before.fork()
        ctx = Context(targets.get("x86-64-v3"))
        sites = rewrite.run(after, ctx)
        well_formed(after)
        if isinstance(sites, Refusal):
            assert after.text() == before.text(), "a refusal must leave the program as it was"
            return before, after, sites
        again = rewrite.run(after.fork(), ctx)
        assert isinstance(again, Refusal) or again == 0, f"a second run changed {again} more sites"
        with torch.no_grad():
            flat = pytree.tree_leaves((tuple(args), dict(kwargs or {})))
            size, place = difference(after.run(flat), pytree.tree_leaves(model(*args, **(kwargs or {}))))
        assert size <= 1, f"{place} deviates {size} times the tolerance"
        return before, after, sites

    return run
