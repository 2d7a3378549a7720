"""The one-file container of artefacts: a checked header, a JSON manifest, then the parts back to back.

Layout: 8 bytes magic, u32 format version, u64 length of the manifest (little endian), 32 bytes sha256 over all of
these and the manifest, the manifest, the parts. The manifest holds the sha256, offset and size of every part, and the
parts fill the rest of the file without gaps: no byte is outside a check.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..passes.errors import ArtefactError

MAGIC = b"\x89LATHE\r\n"
VERSION = 2
HEAD = struct.Struct("<8sIQ")
START = HEAD.size + 32
LONGEST_MANIFEST = 16 * 2**20
KINDS = frozenset(("weights", "json", "library"))
AGAIN = "copy the file again, or optimize and save again"


@dataclass(frozen=True)
class Part:
    """A named piece of the file. Kinds: weights (safetensors), json (UTF-8 text), library (shared library)."""

    name: str
    kind: str
    data: bytes


def write_container(path: str | os.PathLike[str], facts: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Write the file whole or not at all: a temporary name in the same folder, fsync, rename. Raises OSError."""
    rows, offset = [], 0
    for part in parts:
        digest = hashlib.sha256(part.data).hexdigest()
        rows.append({"name": part.name, "kind": part.kind, "offset": offset, "size": len(part.data), "sha256": digest})
        offset += len(part.data)
    manifest = json.dumps({**facts, "format": VERSION, "parts": rows}, sort_keys=True, allow_nan=False).encode()
    head = HEAD.pack(MAGIC, VERSION, len(manifest))
    write_atomically(Path(path), [head, hashlib.sha256(head + manifest).digest(), manifest, *(p.data for p in parts)])


def write_atomically(path: Path, pieces: Sequence[bytes]) -> None:
    """Readers see the old file or the whole new one, also after a crash. Raises OSError."""
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_container(path: str | os.PathLike[str], only: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Part]]:
    """The manifest and the parts by name, every one of them checked before any is returned.

    Args:
        only: read and check no other parts than these (their names); empty reads all.

    Raises:
        ArtefactError: the file is missing, cut, extended, changed, or of another format version.
    """
    place = Path(path)
    if not place.is_file():
        raise ArtefactError(f"there is no file at {place}")
    try:
        with place.open("rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, str(place), only)
    except OSError as error:
        raise ArtefactError(f"cannot read {place}: {error}") from error


def _read(file: BinaryIO, size: int, name: str, only: Collection[str]) -> tuple[dict[str, Any], dict[str, Part]]:
    head, digest = file.read(HEAD.size), file.read(32)
    if len(digest) < 32 or not head.startswith(MAGIC):
        raise ArtefactError(f"{name} is not a torchlathe artefact, or its beginning is damaged", next_step=AGAIN)
    _, version, length = HEAD.unpack(head)
    if version != VERSION:
        raise ArtefactError(f"{name} has the format version {version}, this torchlathe reads version {VERSION}",
                            next_step="load it with the torchlathe version that wrote it")  # fmt: skip
    if length > min(size - START, LONGEST_MANIFEST):
        raise ArtefactError(f"{name} is cut or damaged: its manifest is longer than the file", next_step=AGAIN)
    manifest = file.read(length)
    if hashlib.sha256(head + manifest).digest() != digest:
        raise ArtefactError(f"{name} is damaged: the manifest does not match its checksum", next_step=AGAIN)
    facts = read_json(manifest, f"the manifest of {name}")
    rows = _check_rows(facts, size - START - length, name)
    parts = {}
    for row in rows:
        if only and row["name"] not in only:
            continue
        file.seek(START + length + row["offset"])
        data = file.read(row["size"])
        if len(data) != row["size"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ArtefactError(
                f"{name} is damaged: the part {row['name']} does not match its checksum", next_step=AGAIN
            )
        parts[row["name"]] = Part(row["name"], row["kind"], data)
    return facts, parts


def _check_rows(facts: Any, room: int, name: str) -> list[dict[str, Any]]:
    """The rows of the manifest if they tile the rest of the file exactly."""
    rows = facts.get("parts") if isinstance(facts, dict) else None
    if not isinstance(rows, list) or facts.get("format") != VERSION:
        raise ArtefactError(f"the manifest of {name} lists no parts of format version {VERSION}", next_step=AGAIN)
    offset, seen = 0, set[str]()
    types = {"name": str, "kind": str, "offset": int, "size": int, "sha256": str}
    for row in rows:
        if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != types or row["kind"] not in KINDS:
            raise ArtefactError(f"the manifest of {name} describes a part wrongly", next_step=AGAIN)
        if row["name"] in seen or row["offset"] != offset or row["size"] < 0:
            raise ArtefactError(f"the parts of {name} overlap, repeat or leave gaps", next_step=AGAIN)
        seen.add(row["name"])
        offset += row["size"]
    if offset != room:
        raise ArtefactError(f"{name} is cut or extended: its parts fill {offset} bytes, {room} are there",
                            next_step=AGAIN)  # fmt: skip
    return rows


def read_json(data: bytes, name: str) -> Any:
    """Parsed JSON. Raises ArtefactError for anything that is not strict JSON."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{name} is not valid JSON: {error}", next_step=AGAIN) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
