"""The examples run as a user would run them, and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    """Standard output of an example; fails with its errors if it does not exit with 0."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_scratch_is_short_and_both_passes_fire():
    assert (EXAMPLES / "from_scratch.py").read_text("utf-8").count("\n") < 300
    printed = run("from_scratch.py")
    assert re.search(r"fold_norm: (kept, 2 sites|dropped, \d)", printed)  # its judge may find no gain on a busy machine
    assert "fuse_attention: kept, 1 sites" in printed


@pytest.mark.slow
def test_sentence_embeddings_agree_and_are_faster(tmp_path):
    page = tmp_path / "report.html"
    printed = run("sentence_embeddings.py", "--seconds", "6", "--html", str(page))
    assert float(re.search(r"lowest cosine to the original (\d\.\d+)", printed)[1]) >= 0.99999
    assert float(re.search(r"(\d+\.\d+)x the speed of eager", printed)[1]) > 1
    assert 1_000 < page.stat().st_size < 1_000_000


@pytest.mark.slow
def test_merging_tokens_of_digits_is_faster_and_costs_little(tmp_path):
    printed = run("vision_tokens.py", "--quick", "--folder", str(tmp_path))
    exact, merged = re.findall(r"r=\d+: \d+ tokens at the end, (\d+\.\d+)x, (\d+\.\d+)%", printed)
    assert float(exact[1]) > 80 and float(merged[1]) > float(exact[1]) - 3
    assert float(merged[0]) > 1.1
    page = (tmp_path / "accuracy.html").read_text("utf-8")
    assert page.count("<circle") == 2 and len(page) < 20_000
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
