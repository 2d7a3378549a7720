"""The log of measurements: what was added is found again, by other processes too, whatever happens to the file."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchlathe.targets.records import NAME, Records, key_of


def test_added_values_are_found_by_a_new_reader(tmp_path: Path) -> None:
    Records(tmp_path).add({"a": {"seconds": 1e-6}, "b": [1, None, "x"]})
    again = Records(tmp_path)
    assert again.get("a") == {"seconds": 1e-6} and again.get("b") == [1, None, "x"] and again.get("c") is None
    assert (again.found, again.missed) == (2, 1)


def test_the_latest_value_counts(tmp_path: Path) -> None:
    first, second = Records(tmp_path), Records(tmp_path)
    first.add({"a": 1})
    assert second.get("a") == 1
    first.add({"a": 2, "b": 3})
    assert second.get("b") == 3  # looking for what is not known reads on
    assert second.get("a") == 2


def _write(folder: Path, name: str, count: int) -> None:
    records = Records(folder)
    for i in range(count):
        records.add({f"{name}{i}": i, f"{name}{i}+": -i})


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, name, 40)) for name in "abc"]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    records = Records(tmp_path)
    assert [records.get(f"{n}{i}") for n in "abc" for i in range(40)] == [*range(40)] * 3
    assert records.problem is None


def test_what_was_added_survives_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal; from torchlathe.targets.records import Records\n"
        f"Records(pathlib.Path({str(tmp_path)!r})).add({{'a': 1}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode < 0
    assert Records(tmp_path).get("a") == 1


@pytest.mark.parametrize("damage", ["flipped", "torn", "unended", "binary", "foreign"])
def test_a_damaged_log_is_set_aside_and_rebuilt(tmp_path: Path, damage: str) -> None:
    Records(tmp_path).add({"a": 1, "b": 2, "c": 3})
    path = tmp_path / NAME
    data = path.read_bytes()
    second = data.index(b'"b"')
    path.write_bytes({
        "flipped": data[: second + 10] + bytes([data[second + 10] ^ 1]) + data[second + 11 :],
        "torn": data[: data.rindex(b'"c"') + 5],
        "unended": data[:-1],
        "binary": b"\x00\xff\n" + data,
        "foreign": b'00000000 {"key": 1}\n' + data,
    }[damage])  # fmt: skip
    with pytest.warns(UserWarning, match="set aside"):
        records = Records(tmp_path)
    lost = {"flipped": "b", "torn": "c"}.get(damage)
    assert [k for k in "abc" if records.get(k) is None] == [k for k in "abc" if k == lost]
    assert len(list(tmp_path.glob(f"{NAME}.damaged-*"))) == 1
    records.add({"d": 4})
    assert Records(tmp_path).get("d") == 4  # without a warning


def test_a_folder_that_cannot_be_written_is_named_and_work_goes_on(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    records = Records(blocked / "folder")
    assert records.problem is not None and "not recorded" in records.problem
    records.add({"a": 1})
    assert records.get("a") == 1  # within this process


def test_no_folder_keeps_records_in_memory() -> None:
    records = Records(None)
    records.add({"a": 1})
    assert records.get("a") == 1 and records.problem is not None


def test_keys_depend_on_every_part() -> None:
    assert key_of("a", ["b", 1]) == key_of("a", ["b", 1])
    assert len({key_of("a", ["b", 1]), key_of("a", ["b", 2]), key_of("ab", [1]), key_of("a", "b", 1)}) == 4
