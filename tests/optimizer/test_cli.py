"""The command line: clear messages and exit codes for wrong use, and one way through with a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import torchlathe.optimizer
from torchlathe.optimizer.cli import app
from torchlathe.optimizer.report import Report, Step

MODEL = """
import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).eval(), (torch.randn(8, 16),)


def named():
    class Scale(nn.Module):
        def forward(self, x, *, by):
            return x * by

    return Scale().eval(), (torch.ones(3),), {"by": torch.full((3,), 2.0)}


def no_model():
    return 7


def broken():
    raise ValueError("boom [red]")


constant = 3
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command line in a folder that holds nets.py and a module that lacks an import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(MODEL)
    (tmp_path / "needs_more.py").write_text("import surely_absent_package\n")
    return lambda *words: CliRunner().invoke(app(), words, env={"COLUMNS": "200"})


@pytest.fixture
def stub(monkeypatch):
    """Stands in for the api and records its calls."""
    calls = []

    def optimize(model, args, kwargs, **rest):
        rest["progress"]("capture [now]")
        calls.append((model, args, kwargs, rest))
        return SimpleNamespace(report=Report("Stub", "cpu"), save=lambda path: Path(path).write_bytes(b"saved"))

    def explain(model, args, kwargs, **rest):
        calls.append((model, args, kwargs, rest))
        return Report("Stub", "cpu", steps=[Step("fold-norm", "exact", refusal="no norm [here]")])

    api = SimpleNamespace(optimize=optimize, explain=explain)
    monkeypatch.setitem(sys.modules, "torchlathe.optimizer.api", api)
    monkeypatch.setattr(torchlathe.optimizer, "api", api, raising=False)
    return calls


def test_help_lists_the_commands(call):
    result = call("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("optimize", "explain", "bench", "targets", "report"))


def test_help_does_not_import_torch(tmp_path):
    root = Path(torchlathe.__file__).parent
    (tmp_path / "torchlathe").symlink_to(root)
    script = (
        "import sys\n"
        "from torchlathe.optimizer.cli import main\n"
        "sys.argv = ['torchlathe', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'numpy', 'tvm', 'triton', 'networkx'} & set(sys.modules)\n"
        "assert not code and not heavy, (code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nets.py", "is not of the form"),
        ("nets.py:", "is not of the form"),
        ("absent.py:mlp", "there is no file absent.py"),
        ("absent_module:mlp", "there is no module 'absent_module'"),
        ("nets.py:mpl", "no function 'mpl'; it has: mlp, named, no_model, broken"),
        ("nets.py:constant", "no function 'constant'"),
        ("nets.py:no_model", "must return (model, args)"),
    ],
)
def test_wrong_spec_is_a_usage_error(call, stub, spec, message):
    result = call("explain", spec)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not stub


def test_error_in_the_users_code(call, stub):
    result = call("optimize", "nets.py:broken")
    assert result.exit_code == 1
    assert "error: ValueError: boom [red]" in result.output
    assert "Traceback" not in result.output
    assert isinstance(call("optimize", "nets.py:broken", "--debug").exception, ValueError)


@pytest.mark.parametrize("spec", ["needs_more.py:f", "needs_more:f"])
def test_missing_import_in_the_users_code(call, stub, spec):
    result = call("explain", spec)
    assert result.exit_code == 1
    assert "No module named 'surely_absent_package'" in result.output


@pytest.mark.parametrize(
    ("text", "amount"), [("65536", 65536), ("500M", 500_000_000), ("2kB", 2000), ("1TiB", 1 << 40)]
)
def test_amounts_of_memory(call, stub, text, amount):
    assert call("optimize", "nets.py:mlp", "--device-memory", text).exit_code == 0
    assert stub[0][3]["device_memory"] == amount


@pytest.mark.parametrize("text", ["8 apples", "-1", "GiB", "1e9"])
def test_what_is_no_amount_of_memory(call, stub, text):
    result = call("optimize", "nets.py:mlp", "--device-memory", text)
    assert result.exit_code == 2 and "--device-memory" in result.output and not stub


def test_options_are_passed_on(call, stub):
    result = call("optimize", "nets.py:named", "--target", "x86-64-v3", "--passes", "a, b", "--limit", "2",
                  "--level", "fast", "--threads", "1", "--aot", "--device-memory", "1.5 MiB",
                  "--out", "x.lathe", "--html", "x.html", "--json", "x.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    ((_, args, kwargs, rest),) = stub
    assert torch.equal(args[0], torch.ones(3)) and kwargs["by"].tolist() == [2.0] * 3
    progress = rest.pop("progress")
    assert callable(progress)
    wanted = {"target": "x86-64-v3", "passes": ["a", "b"], "limit": 2, "level": "fast", "num_threads": 1, "aot": True,
              "device_memory": 3 << 19}  # fmt: skip
    assert rest == wanted
    assert "capture [now]" in result.output
    assert Path("x.lathe").read_bytes() == b"saved"
    assert Path("x.html").read_text().startswith("<!DOCTYPE html>")
    assert Report.from_dict(json.loads(Path("x.json").read_text())) == Report("Stub", "cpu")
    assert all(f"wrote {name}" in result.output for name in ("x.lathe", "x.html", "x.json"))


def test_default_is_the_standard_passes(call, stub):
    assert call("explain", "nets:mlp").exit_code == 0
    assert stub[0][3] == {"target": "cpu", "passes": None}


def test_explain_shows_axes(call):
    result = call("explain", "nets:mlp", "--axes")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any(line.startswith("linear [") and " mixes " in line for line in lines)
    assert any(" = " in line for line in lines)


def test_explain_prints_reasons_as_they_are(call, stub):
    result = call("explain", "nets.py:mlp")
    assert "refused: no norm [here]" in result.output


def test_unwritable_output_is_refused_before_the_work(call, stub):
    result = call("optimize", "nets.py:mlp", "--out", "no/such/folder/x.lathe")
    assert result.exit_code == 2 and "there is no folder" in result.output
    assert not stub


def test_bench_knows_its_rivals(call, stub):
    result = call("bench", "nets.py:mlp", "--against", "eager,onnx")
    assert result.exit_code == 2 and "'onnx' is neither of eager, compile" in result.output


def test_targets(call):
    result = call("targets")
    assert result.exit_code == 0
    assert all(f" {name} " in result.output for name in ("cpu", "x86-64-v4", "nvidia-sm90", "amd-gfx942"))
    facts = {row["name"]: row for row in json.loads(call("targets", "--json").stdout)}
    assert facts["cpu"]["cores"] >= 1 and facts["nvidia-sm90"]["source"]


def test_unknown_names(call):
    result = call("explain", "nets.py:mlp", "--passes", "fuse-atention")
    assert result.exit_code == 1 and "fuse-attention" in result.output
    result = call("explain", "nets.py:mlp", "--target", "x86-64-v9")
    assert result.exit_code == 1 and "x86-64-v4" in result.output and "Traceback" not in result.output


def test_optimize_then_report(call):
    result = call("optimize", "nets.py:mlp", "--out", "mlp.lathe", "--json", "mlp.json", "--html", "mlp.html")
    assert result.exit_code == 0, result.output
    written = Report.from_dict(json.loads(Path("mlp.json").read_text()))
    assert written.ratio is not None and written.steps and written.kernels
    assert all(step.name in result.output for step in written.steps)
    shown = call("report", "mlp.lathe", "--json")
    assert shown.exit_code == 0, shown.output
    stored = Report.from_dict(json.loads(shown.stdout))
    assert (stored.model, stored.steps, stored.ratio) == (written.model, written.steps, written.ratio)
    assert written.headline() in call("report", "mlp.lathe").output
    assert call("report", "mlp.lathe", "--html", "again.html").exit_code == 0
    assert written.headline() in Path("again.html").read_text()


def test_report_of_a_foreign_file(call):
    Path("foreign.lathe").write_bytes(b"no artefact at all")
    result = call("report", "foreign.lathe")
    assert result.exit_code == 1 and result.output.startswith("error: ")
    assert "--debug" not in result.output  # which is offered for untyped errors only
    assert call("report", "absent.lathe").exit_code == 2


def test_bench(call):
    result = call("bench", "nets.py:named", "--against", "eager", "--rounds", "7")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if line.split()[:1] in (["eager"], ["torchlathe"])]
    assert [row[0] for row in rows] == ["eager", "torchlathe"]
    assert "1x" in rows[0]  # eager against itself
    assert float(rows[1][-1]) <= 1  # equal answers
