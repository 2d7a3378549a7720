"""How the inner loop multiplies operands of each type, and what it needs from the processor.

A 32-bit lane holds `group` neighbouring elements of the depth, and one instruction multiplies and adds them all: two
bfloat16 values (``vdpbf16ps``), four bytes (``vpdpbusd``, unsigned times signed), or two 16-bit integers
(``pmaddwd``). Without such an instruction operands are converted to float32. Signed bytes on the left are shifted by
128 into the unsigned range, which adds 128 times the sum of each column of the right operand; that is the number that
the accumulators start from, negated. Without ``vpdpbusd``, bytes are widened to 16 bits: ``pmaddubsw`` would be
shorter, and would saturate at operand extremes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm import ir, tirx

from ...targets.target import Target
from ..plans.values import FLOATS, Unsupported
from .math import Block

PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define i32 @lathe_prefetch(ptr %line) alwaysinline {
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 3, i32 1)
  ret i32 0
}
"""


@dataclass(frozen=True)
class Dot:
    """One way to multiply.

    Attributes:
        name: readable name.
        group: elements of the depth in one 32-bit lane.
        accumulator: scalar type of the sums.
        stored: type in which a constant right operand is packed.
        intrinsic: LLVM's name of the instruction, with the vector width left open; empty for multiply and add.
        operand: LLVM's type of both factors.
        shifted: whether the left operand is shifted from signed to unsigned.
    """

    name: str
    group: int = 1
    accumulator: str = "float32"
    stored: torch.dtype = torch.float32
    intrinsic: str = ""
    operand: str = ""
    shifted: bool = False

    @property
    def constants(self) -> int:
        """Tensors that a constant right operand becomes."""
        return 2 if self.shifted or self.name == "weight-int4" else 1


PLAIN = Dot("float32")
WEIGHT_INT8 = Dot("weight-int8", stored=torch.int8)
WEIGHT_INT4 = Dot("weight-int4", stored=torch.uint8)
BFLOAT16 = Dot("bfloat16", 2, "float32", torch.bfloat16, "llvm.x86.avx512bf16.dpbf16ps.{bits}", "bfloat")
BYTES = Dot("int8", 4, "int32", torch.int8, "llvm.x86.avx512.vpdpbusd.{bits}", "i8", True)
WORDS = Dot("int8-as-int16", 2, "int32", torch.int16, "llvm.x86.avx512.pmaddw.d.512", "i16")
WORDS_256 = Dot("int8-as-int16", 2, "int32", torch.int16, "llvm.x86.avx2.pmadd.wd", "i16")


def dot_of(left: torch.dtype, right: torch.dtype, target: Target) -> Dot:
    """The fastest way to multiply operands of these types on a target. Raises Unsupported."""
    if left in FLOATS and right in (torch.int8, torch.uint8):
        return WEIGHT_INT8 if right is torch.int8 else WEIGHT_INT4
    if left in FLOATS and left is right:
        fits = "avx512_bf16" in target.features and (target.vector_bits == 512 or "avx512vl" in target.features)
        return BFLOAT16 if left is torch.bfloat16 and fits else PLAIN
    if left is torch.int8 and right is torch.int8:
        return _bytes(target)
    raise Unsupported(f"a product of {left} and {right}")


def _bytes(target: Target) -> Dot:
    features, bits = target.features, target.vector_bits
    if "avx512_vnni" in features and (bits == 512 or "avx512vl" in features):
        return BYTES
    if bits == 512 and "avx512bw" in features:
        return WORDS
    if bits == 256 and "avx2" in features:
        return WORDS_256
    raise Unsupported("a product of bytes: the target has no instruction for it")


def declaration(dot: Dot, lanes: int) -> str:
    """LLVM IR of the function `name_of(dot, lanes)`, empty for multiply and add.

    The casts live in there because TVM has no vector of bfloat16 that LLVM would take.
    """
    if not dot.intrinsic:
        return ""
    total = "float" if dot.accumulator == "float32" else "i32"
    sums, words, parts = f"<{lanes} x {total}>", f"<{lanes} x i32>", f"<{lanes * dot.group} x {dot.operand}>"
    call, plus = dot.intrinsic.format(bits=lanes * 32), ""
    signature = f"{sums}, {parts}, {parts}"
    arguments = f"{sums} %acc, {parts} %x, {parts} %y"
    if dot.operand == "i16":  # this one does not add
        signature, arguments = f"{parts}, {parts}", f"{parts} %x, {parts} %y"
        plus = f"  %sum = add {sums} %acc, %r\n"
    return (
        f"declare {sums} @{call}({signature})\n"
        f"define {sums} @{name_of(dot, lanes)}({sums} %acc, {words} %a, {words} %b) alwaysinline {{\n"
        f"  %x = bitcast {words} %a to {parts}\n  %y = bitcast {words} %b to {parts}\n"
        f"  %r = call {sums} @{call}({arguments})\n{plus}  ret {sums} %{'sum' if plus else 'r'}\n}}\n"
    )


def name_of(dot: Dot, lanes: int) -> str:
    """Name of the function in `declaration`."""
    return f"lathe_dot_{dot.name.replace('-', '_')}_{lanes}"


def with_declaration(dot: Dot, lanes: int, body: Any) -> Any:
    """A statement that may use the dot and `prefetch`."""
    text = ir.StringImm(PREFETCH + declaration(dot, lanes))
    return tirx.AttrStmt(ir.StringImm("dot"), "pragma_import_llvm", text, body)


def prefetch(buffer: Any, index: Any) -> Any:
    """A statement that asks for the cache line of an element, which may lie beyond the buffer."""
    return tirx.Evaluate(tirx.call_extern("int32", "lathe_prefetch", tirx.address_of(tirx.BufferLoad(buffer, [index]))))


def multiply_add(dot: Dot, b: Block, total: Any, factor: Any, vector: Any) -> Any:
    """total + the sum over the group of factor times vector, lane by lane."""
    if not dot.intrinsic:
        return total + factor * vector
    return tirx.call_extern(b.dtype(dot.accumulator), name_of(dot, b.lanes), total, factor, vector)


def word(dot: Dot, one: Block, elements: Any) -> Any:
    """A group of elements of the left operand (a short vector as stored) as the 32-bit number to broadcast."""
    if dot.operand == "i16":
        elements = tirx.Cast("int16x2", elements)
    number = one.let(tirx.reinterpret("int32", elements))
    return one.let(number ^ tirx.const(-0x7F7F7F80, "int32")) if dot.shifted else number


def pack(matrix: torch.Tensor, width: int, dot: Dot) -> torch.Tensor:
    """A matrix [depth, columns] as zero-padded panels [panels, depth / group, width], `group` elements in each lane."""
    depth, columns = matrix.shape
    count, steps = -(-columns // width), -(-depth // dot.group)
    padded = torch.zeros(steps * dot.group, count * width, dtype=dot.stored)
    padded[:depth, :columns] = matrix
    panels = padded.view(steps, dot.group, count, width).permute(2, 0, 3, 1).contiguous()
    return panels.squeeze(-1) if dot.group == 1 else panels.view(torch.int32).squeeze(-1)


def pack_levels(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
                width: int) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A weight of four bits (see `passes.ops.linear_int4`) and its scales and offsets, [panels, 2 groups, width]."""
    lines = torch.stack([scale.t(), offset.t()], 1).flatten(0, 1)
    return pack(weight.t(), width, WEIGHT_INT4), pack(lines, width, PLAIN)


def start_of(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """What the sums of shifted products start from: -128 times the sum of each column, for whole panels."""
    columns = matrix.shape[1]
    start = torch.zeros(-(-columns // width) * width, dtype=torch.int32)
    start[:columns] = -128 * matrix.to(torch.int32).sum(0)
    return start
