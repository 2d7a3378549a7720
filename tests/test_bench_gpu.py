"""bench/gpu.py runs from the source tree without a GPU: kernels interpreted, sizes toys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The finished process. The package is found by the script itself, installed or not."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)


@pytest.mark.slow
def test_a_dry_check_runs_kernels_and_writes_both_files(tmp_path):
    done = run("--device", "cpu", "--out", str(tmp_path), "--check", "--match", "cat of rows", "--processes", "1",
               TRITON_INTERPRET="1")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    assert row["cells"]["verdict"] == "OK" and "2 schedules of rows_cat_mul" in row["cells"]["found"]
    assert "| OK | cat of rows |" in (tmp_path / "gpu-check.md").read_text()


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_names_the_dry_run(tmp_path):
    done = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no usable GPU" in done.stderr and "TRITON_INTERPRET=1 python bench/gpu.py --device cpu" in done.stderr
