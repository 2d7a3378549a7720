"""The structure that the design promises, read from the source: floors, sizes, docstrings, names, tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("targets", "passes", "codegen", "optimizer")  # from the ground up
FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))
FORBIDDEN = re.compile(r"manager|handler|util|helper|common|misc", re.IGNORECASE)
ALLOWED = {"MergeCommon", "merge_common"}  # common subexpressions are the field's own term


def trees():
    """(path relative to the root, syntax tree) of every file on the four floors."""
    return [(p.relative_to(ROOT), ast.parse(p.read_text("utf-8"))) for p in FILES]


def imports(path: Path, tree: ast.AST):
    """Modules of the package that a file imports anywhere, as dotted names without the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(path.with_suffix("").parts)[: -node.level]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield from_parts([*base, alias.name]) or from_parts(base)


def from_parts(parts: list[str]) -> str | None:
    """The dotted name if these parts name a module of the package."""
    place = ROOT.joinpath(*parts)
    if parts and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()):
        return ".".join(parts)
    return None


def test_arrows_go_down():
    for path, tree in trees():
        height = FLOORS.index(path.parts[0])
        for module in imports(path, tree):
            if module and module.split(".")[0] in FLOORS:
                assert FLOORS.index(module.split(".")[0]) <= height, f"{path} imports upwards: {module}"


def test_no_import_circle():
    graph = nx.DiGraph()
    for path, tree in trees():
        parts = path.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph.add_edges_from((name, m) for m in imports(path, tree) if m and m != name)
    circles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles, f"import circles: {circles}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_documented(path):
    text = path.read_text("utf-8")
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has 60 lines or more"
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno} swallows {caught}"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert not FORBIDDEN.search(node.name) or node.name in ALLOWED, node.name
            assert node.name.startswith("_") or ast.get_docstring(node), f"{node.name} has no docstring"
    assert not FORBIDDEN.search(path.stem) or path.stem in ALLOWED
    for number, line in enumerate(text.splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|HACK|XXX)\b", line), f"line {number}: {line}"
        assert not re.search(r"#\s*type:\s*ignore\s*$", line), f"line {number}: type-ignore without a rule"


def test_the_core_is_one_short_read():
    core = ("passes/program.py", "passes/base.py", "passes/rewrite.py", "optimizer/pipeline.py")
    assert sum((ROOT / f).read_text("utf-8").count("\n") for f in core) <= 400


def test_every_pass_has_its_test_and_golden():
    for path in (ROOT / "passes" / "exact").glob("[!_]*.py"):
        assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").exists(), f"{path.name} has no test file"
        assert list((ROOT / "tests" / "golden" / f"test_{path.stem}").glob("*.txt")), f"{path.name} has no golden text"


def test_every_test_can_fail():
    checks = re.compile(r"\bassert|raises|warns|golden\(|ask\(")
    for path in (ROOT / "tests").rglob("test_*.py"):
        functions = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)]
        own = [n.name for n in functions if checks.search(ast.unparse(n)) and not n.name.startswith("test_")]
        indirect = re.compile("|".join([*(rf"\b{name}\(" for name in own), checks.pattern]))
        for node in functions:
            if node.name.startswith("test_"):
                assert indirect.search(ast.unparse(node)), f"{path.name}: {node.name} cannot fail"


def test_only_the_package_file_stands_at_the_root():
    assert [p.name for p in ROOT.glob("*.py")] == ["__init__.py"]


def test_importing_the_package_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, torchlathe; print([m for m in ('torch', 'tvm', 'triton', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert found.stdout.strip() == "[]"
