"""From the text of kernels to something that can be called: compiled for a GPU, or run by Triton's interpreter."""

from __future__ import annotations

import functools
import hashlib
import linecache
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch

from ...passes.errors import LatheError, LowerError
from ...targets.target import Target
from .code import Code, Launch, dimensions

ALIGNMENT = 16  # bytes: what kernels assume of every tensor's address
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip


def interpreted() -> bool:
    """Whether kernels are run by Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def gpu_target(target: Target) -> Any:
    """The target as Triton names it."""
    from triton.backends.compiler import GPUTarget

    if target.vendor == "amd":
        return GPUTarget("hip", target.mcpu, 64)
    return GPUTarget("cuda", int(target.mcpu.removeprefix("sm_")), 32)


@functools.lru_cache(maxsize=4096)
def _namespace(text: str) -> Mapping[str, Any]:
    """The module of a text. Its lines are registered, because Triton reads the source of its kernels."""
    name = f"<torchlathe kernel {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": f"torchlathe_kernel_{abs(hash(name))}", "__file__": name}
    exec(compile(text, name, "exec"), space)
    return space


@dataclass
class Binary:
    """A kernel compiled for a GPU.

    Attributes:
        compiled: Triton's object: code in all stages, metadata, and what launches it.
        registers: 32-bit registers of a thread, 0 if not known.
        spills: bytes of registers that spill to memory.
        shared: bytes of shared memory of a program.
    """

    compiled: Any
    registers: int = 0
    spills: int = 0
    shared: int = 0


def compile_launch(code: Code, launch: Launch, dtypes: Sequence[torch.dtype], target: Target) -> Binary:
    """Compile one kernel for a GPU, which need not be here. Raises LowerError."""
    import triton
    from triton.compiler import ASTSource

    kernel = _namespace(code.text)[launch.function]
    names = kernel.arg_names
    types = [POINTERS[dtypes[k]] for k in launch.tensors] + ["i64"] * len(code.sizes)
    attrs = {(k,): [["tt.divisibility", ALIGNMENT]] for k in range(len(launch.tensors))}
    source = ASTSource(kernel, dict(zip(names, types, strict=True)), {}, attrs)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=gpu_target(target), options=options)
    except Exception as error:  # the compiler raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise LowerError(f"triton cannot compile {launch.function} for {target.name}: {reason}", by="triton") from error
    return Binary(compiled, shared=int(compiled.metadata.shared))


def resources(binary: Binary) -> Binary:
    """The binary with its registers and spills read back from the machine code."""
    asm = binary.compiled.asm
    if "amdgcn" in asm:
        found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)",
                                                  asm["amdgcn"])}  # fmt: skip
        binary.registers = found.get("vgpr_count", 0)
        binary.spills = 4 * (found.get("vgpr_spill_count", 0) + found.get("sgpr_spill_count", 0))
    elif "cubin" in asm:
        text = _resource_usage(asm["cubin"])
        found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        binary.registers, binary.spills = found.get("REG", 0), found.get("STACK", 0) + found.get("LOCAL", 0)
    return binary


def _resource_usage(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False).stdout


@dataclass
class Runner:
    """Calls the kernels of a region in order.

    Attributes:
        code: the kernels.
        target: what they were compiled for.
        binaries: one per launch; None for what is interpreted, and for torch's own products.
        outputs: how many of the last parameters are written.
    """

    code: Code
    target: Target
    binaries: Sequence[Binary | None]
    outputs: int
    _grids: list[Any] = field(default_factory=list, repr=False)
    _scratch: list[Any] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._grids = [self._sized([sympy.Mul(*(launch.grid[k] for k in axes)) for axes in dimensions(launch.grid)])
                       for launch in self.code.launches]  # fmt: skip
        self._scratch = [(self._sized(shape), dtype) for shape, dtype in self.code.scratch]

    def _sized(self, expressions: Sequence[Any]) -> Any:
        """Fixed values, or a function of the sizes."""
        if all(e.is_Integer for e in expressions):
            return tuple(int(e) for e in expressions)
        return self.code.evaluator(expressions)

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run on inputs, constants and outputs, in this order; the outputs are written."""
        sizes = tuple(tensors[k].shape[d] for k, d in self.code.sizes)
        taken = [aligned(t) for t in tensors]
        for shape, dtype in self._scratch:
            size = shape(*sizes) if callable(shape) else shape
            taken.append(torch.empty(size, dtype=dtype, device=tensors[0].device))
        for k, launch in enumerate(self.code.launches):
            grid = self._grids[k](*sizes) if callable(self._grids[k]) else self._grids[k]
            if 0 in grid:
                continue
            if not launch.function:
                left, right, result = (taken[t] for t in launch.tensors)
                right = right.t() if launch.turned else right
                torch.mm(left.view(-1, right.shape[0]), right, out=result)
                continue
            self._launch(k, (*grid, 1, 1)[:3], (*(taken[t] for t in launch.tensors), *sizes))
        first = len(tensors) - self.outputs
        for given, written in zip(tensors[first:], taken[first:], strict=False):  # scratch memory comes after them
            if given is not written:
                given.copy_(written)

    def _launch(self, number: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        if self.binaries[number] is None:
            _namespace(self.code.text)[self.code.launches[number].function][grid](*arguments)
            return
        compiled = self.binaries[number].compiled  # type: ignore[union-attr]
        if compiled.metadata.global_scratch_size:  # where descriptors are built
            self._provide_scratch()
        stream = _stream(arguments[0].device.index)
        run = compiled.run  # loads the machine code
        run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)

    @staticmethod
    def _provide_scratch() -> None:
        import triton

        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if its address is not a multiple of ALIGNMENT."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = tensor.as_strided((span,), (1,))  # copied as it lies: elements of an expanded tensor share their place
    return memory.clone().as_strided(tensor.shape, tensor.stride())


def _stream(index: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(index))


def runner(code: Code, binaries: Sequence[Binary | None], target: Target, outputs: int) -> Callable[..., None]:
    """What calls the kernels of a region, or says that their GPU is not in this host."""
    return Runner(code, target, binaries, outputs) if interpreted() or is_here(target) else absent(target)


def absent(target: Target) -> Callable[..., None]:
    """What stands for a kernel that was compiled for a GPU which this host does not have."""

    def call(*tensors: torch.Tensor) -> None:
        raise LatheError(f"this kernel was compiled ahead of time for {target.name}, which is not in this host",
                         next_step="save the executable, and load it where the GPU is")  # fmt: skip

    return call


def is_here(target: Target) -> bool:
    """Whether this host has a GPU that runs code for a target."""
    if not torch.cuda.is_available():
        return False
    if torch.version.hip:
        return bool(torch.cuda.get_device_properties(0).gcnArchName.split(":")[0] == target.mcpu)
    major, minor = torch.cuda.get_device_capability()
    return target.vendor == "nvidia" and target.mcpu == f"sm_{major}{minor}"
