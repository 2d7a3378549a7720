"""Compiled kernels as bytes: what an artefact keeps of a region, and what is made of it where its GPU is."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sympy

from ...passes.errors import ArtefactError
from ..graph_json import DTYPES
from ..symbols import decode as decode_expression
from ..symbols import encode as encode_expression
from .code import Code, Launch
from .compile import Binary

Json = Any
KEPT = frozenset(("json", "ttir", "ptx", "cubin", "amdgcn", "hsaco"))  # suffixes of the files that Triton writes


def encode(code: Code, binaries: Sequence[Binary | None]) -> bytes:
    """The kernels of a region with their machine code."""
    launches = [
        {"function": n.function, "tensors": n.tensors, "grid": [encode_expression(e) for e in n.grid],
         "warps": n.warps, "stages": n.stages, "turned": n.turned}
        for n in code.launches
    ]  # fmt: skip
    scratch = [[[encode_expression(e) for e in s], str(dtype).removeprefix("torch.")] for s, dtype in code.scratch]
    stored = {"text": code.text, "launches": launches, "sizes": code.sizes, "symbols": code.symbols, "scratch": scratch,
              "triton": _version(), "binaries": [b and _encode_binary(b) for b in binaries]}  # fmt: skip
    return json.dumps(stored).encode()


def decode(data: bytes) -> tuple[Code, list[Binary | None]]:
    """The inverse of `encode`.

    Raises:
        ArtefactError: another version of Triton made the machine code.
        KeyError, TypeError, ValueError: malformed content.
    """
    stored = json.loads(data)
    if stored["triton"] != _version():
        raise ArtefactError(f"compiled by triton {stored['triton']}, here is {_version()}")
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in stored["symbols"]}

    def expressions(listed: Json) -> tuple[sympy.Expr, ...]:
        return tuple(decode_expression(e, symbols) for e in listed)

    launches = tuple(Launch(str(n["function"]), tuple(map(int, n["tensors"])), expressions(n["grid"]), int(n["warps"]),
                            int(n["stages"]), bool(n["turned"])) for n in stored["launches"])  # fmt: skip
    scratch = tuple((expressions(shape), DTYPES[dtype]) for shape, dtype in stored["scratch"])
    sizes = tuple((int(k), int(d)) for k, d in stored["sizes"])
    code = Code(str(stored["text"]), launches, sizes, tuple(map(str, stored["symbols"])), scratch)
    return code, [b and _decode_binary(b) for b in stored["binaries"]]


def _version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _encode_binary(binary: Binary) -> Json:
    files = {}
    for name, path in binary.compiled.metadata_group.items():
        if Path(name).suffix[1:] in KEPT:
            files[Path(name).name] = base64.b64encode(Path(path).read_bytes()).decode()
    signature = dict(binary.compiled.src.signature)
    return {"files": files, "signature": signature, "registers": binary.registers, "spills": binary.spills,
            "shared": binary.shared}  # fmt: skip


def _decode_binary(stored: Json) -> Binary:
    """Triton's object, from files in a folder that is gone when it has read them."""
    from triton.compiler import CompiledKernel

    signature = {str(k): str(v) for k, v in stored["signature"].items()}
    source = SimpleNamespace(signature=signature, constants={}, fn=SimpleNamespace(arg_names=list(signature)))
    with tempfile.TemporaryDirectory() as folder:
        group = {}
        for name, data in stored["files"].items():
            if Path(name).name != name or Path(name).suffix[1:] not in KEPT:
                raise ValueError(f"{name[:80]} is no file of a kernel")
            path = Path(folder) / name
            path.write_bytes(base64.b64decode(data))
            group[name] = str(path)
        compiled = CompiledKernel(source, group, "")
    return Binary(compiled, int(stored["registers"]), int(stored["spills"]), int(stored["shared"]))
