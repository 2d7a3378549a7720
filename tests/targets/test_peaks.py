"""The store of measured peak rates: damage, foreign folders and unwritable places cost time, never the answer."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from torchlathe.targets.peaks import Peaks, cached_peaks, measure_peaks

FOUND = Peaks(flops=2.5e11, bandwidth=4.7e10)


def counted(repeatable: bool = True) -> tuple[Callable[[], tuple[Peaks, bool]], list[int]]:
    calls: list[int] = []

    def measure() -> tuple[Peaks, bool]:
        calls.append(1)
        return FOUND, repeatable

    return measure, calls


def test_measured_once_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "torchlathe"
    measure, calls = counted()
    assert [cached_peaks("k", measure, folder) for _ in range(3)] == [FOUND] * 3
    assert len(calls) == 1
    assert [path.name for path in folder.iterdir()] == ["cpu-k.json"]  # no temporary file is left
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cached_peaks("other", measure, folder)
    assert len(calls) == 2


def test_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "torchlathe"))
    measure, _ = counted()
    cached_peaks("k", measure)
    assert (tmp_path / "torchlathe" / "cpu-k.json").exists()


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    measure, calls = counted()
    cached_peaks("k", measure, tmp_path / "c")
    path = tmp_path / "c" / "cpu-k.json"
    good = path.read_bytes()
    changed = 0
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x11]) + good[position + 1 :])
        before = len(calls)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert cached_peaks("k", measure, tmp_path / "c") == FOUND
        if len(calls) > before:
            changed += 1
            assert len(caught) == 1 and "measuring this CPU again" in str(caught[0].message)
            assert path.read_bytes() == good  # repaired
    assert changed >= len(good) - 10  # the last digit of a number may round away, nothing else


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"rates": {"flops": NaN, "bandwidth": 1}}',
        b'{"rates": {"flops": -1.0, "bandwidth": 1.0}, "digest": ""}',
        b'{"rates": {"flops": [1], "bandwidth": {}}}',
        b'{"rates": 3, "digest": 4}',
    ],
)
def test_foreign_content_warns_once_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    measure, calls = counted()
    cached_peaks("k", measure, tmp_path / "c")
    (tmp_path / "c" / "cpu-k.json").write_bytes(content)
    with pytest.warns(RuntimeWarning, match="damaged") as caught:
        assert cached_peaks("k", measure, tmp_path / "c") == FOUND
    assert len(caught) == 1 and len(calls) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached_peaks("k", measure, tmp_path / "c")
    assert len(calls) == 2


def test_a_file_of_another_machine_is_not_used(tmp_path: Path) -> None:
    measure, calls = counted()
    cached_peaks("a", measure, tmp_path / "c")
    (tmp_path / "c" / "cpu-a.json").rename(tmp_path / "c" / "cpu-b.json")
    with pytest.warns(RuntimeWarning, match="damaged"):
        cached_peaks("b", measure, tmp_path / "c")
    assert len(calls) == 2


def test_unusable_folder_works_without_storing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    measure, calls = counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached_peaks("k", measure, tmp_path / "file" / "torchlathe") == FOUND
        assert cached_peaks("k", measure, tmp_path / "file") == FOUND
    assert len(calls) == 2


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    measure, _ = counted()
    assert cached_peaks("k", measure, tmp_path / "c") == FOUND
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")
def test_links_and_folders_open_to_others_are_not_trusted(tmp_path: Path) -> None:
    measure, calls = counted()
    cached_peaks("k", measure, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cached_peaks("k", measure, tmp_path / "link")
    assert len(calls) == 2
    (tmp_path / "real").chmod(0o777)
    cached_peaks("k", measure, tmp_path / "real")
    assert len(calls) == 3
    (tmp_path / "real").chmod(0o700)
    target = tmp_path / "elsewhere.json"
    (tmp_path / "real" / "cpu-k.json").rename(target)
    (tmp_path / "real" / "cpu-k.json").symlink_to(target)
    cached_peaks("k", measure, tmp_path / "real")
    assert len(calls) == 4


def test_figures_of_a_busy_machine_are_used_but_not_stored(tmp_path: Path) -> None:
    measure, calls = counted(repeatable=False)
    assert cached_peaks("k", measure, tmp_path / "c") == cached_peaks("k", measure, tmp_path / "c") == FOUND
    assert len(calls) == 2


def test_measured_rates_are_plausible() -> None:
    peaks, _ = measure_peaks(cores=2, cache_bytes=2**20, memory=2**30)
    assert 1e8 < peaks.flops < 1e15
    assert 1e8 < peaks.bandwidth < 1e13


def test_stored_text_is_plain_json(tmp_path: Path) -> None:
    measure, _ = counted()
    cached_peaks("k", measure, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "cpu-k.json").read_text())
    assert content["rates"] == {"flops": 2.5e11, "bandwidth": 4.7e10}
