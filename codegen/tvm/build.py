"""Compiling TIR to native functions, saving and loading them, and running their threads on torch's own pool.

TVM and torch (OpenMP) each keep a pool of spinning threads; on few cores they starve each other. Compiled TVM code
starts its threads through a pointer in its own library, ``__TVMBackendParallelLaunch``. A launcher written in LLVM
IR takes its place and runs the tasks with ``GOMP_parallel`` of the OpenMP runtime that torch has loaded: one pool for
both, the thread count of ``torch.set_num_threads``, and 1 us instead of 5 us per launch. Where no GNU-compatible
OpenMP runtime is loaded the pointer is left alone and TVM's own pool runs the tasks.

The tasks of a loop are cut into eight shares per thread. A thread runs its own shares, neighbours in the loop, and then
takes what is left of the others', so that a thread that loses its core for a while does not hold up all.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from ...targets.target import Target

OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
SETTER = "set_launcher"
# instruction sets that a level of x86-64 does not imply, as the operating system and as LLVM call them
DOTS = {"avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx_vnni": "avxvnni"}

# args points at 16-byte tagged values: the payload of value k lies at 16 k + 8; an int result has tag 1
LAUNCHER = """
%job = type { ptr, ptr, ptr }
%environment = type { ptr, i32 }
%counter = type [16 x i32]
@openmp = internal global [4 x ptr] zeroinitializer

define internal void @task(ptr %job) {
entry:
  %data.at = getelementptr %job, ptr %job, i32 0, i32 1
  %counters.at = getelementptr %job, ptr %job, i32 0, i32 2
  %body = load ptr, ptr %job
  %data = load ptr, ptr %data.at
  %counters = load ptr, ptr %counters.at
  %number.at = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 1
  %count.at = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 2
  %number.of = load ptr, ptr %number.at
  %count.of = load ptr, ptr %count.at
  %number = call i32 %number.of()
  %count = call i32 %count.of()
  %shares = mul i32 %count, 8
  %env = alloca %environment
  %env.count = getelementptr %environment, ptr %env, i32 0, i32 1
  store ptr null, ptr %env
  store i32 %shares, ptr %env.count
  br label %owner
owner:
  %turn = phi i32 [ 0, %entry ], [ %next.turn, %next ]
  %place = add i32 %number, %turn
  %victim = urem i32 %place, %count
  %counter = getelementptr %counter, ptr %counters, i32 %victim
  %first = mul i32 %victim, 8
  br label %take
take:
  %taken = atomicrmw add ptr %counter, i32 1 monotonic
  %left = icmp ult i32 %taken, 8
  br i1 %left, label %run, label %next
run:
  %share = add i32 %first, %taken
  %status = call i32 %body(i32 %share, ptr %env, ptr %data)
  br label %take
next:
  %next.turn = add i32 %turn, 1
  %more = icmp ult i32 %next.turn, %count
  br i1 %more, label %owner, label %done
done:
  ret void
}

define internal i32 @launch(ptr %body, ptr %data, i32 %wanted) {
  %job = alloca %job
  %data.at = getelementptr %job, ptr %job, i32 0, i32 1
  %counters.at = getelementptr %job, ptr %job, i32 0, i32 2
  store ptr %body, ptr %job
  store ptr %data, ptr %data.at
  %parallel = load ptr, ptr @openmp
  %max.at = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 3
  %max.of = load ptr, ptr %max.at
  %max = call i32 %max.of()
  %all = icmp eq i32 %wanted, 0
  %count = select i1 %all, i32 %max, i32 %wanted
  %counters = alloca %counter, i32 %count, align 64
  %long = zext i32 %count to i64
  %size = mul i64 %long, 64
  call void @llvm.memset.p0.i64(ptr %counters, i8 0, i64 %size, i1 false)
  store ptr %counters, ptr %counters.at
  call void %parallel(ptr @task, ptr %job, i32 %count, i32 0)
  ret i32 0
}

declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define i32 @__tvm_ffi_launcher(ptr %self, ptr %args, i32 %count, ptr %result) {
  %from.0 = getelementptr i8, ptr %args, i64 8
  %from.1 = getelementptr i8, ptr %args, i64 24
  %from.2 = getelementptr i8, ptr %args, i64 40
  %from.3 = getelementptr i8, ptr %args, i64 56
  %value.0 = load ptr, ptr %from.0
  %value.1 = load ptr, ptr %from.1
  %value.2 = load ptr, ptr %from.2
  %value.3 = load ptr, ptr %from.3
  %to.1 = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 1
  %to.2 = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 2
  %to.3 = getelementptr [4 x ptr], ptr @openmp, i32 0, i32 3
  store ptr %value.0, ptr @openmp
  store ptr %value.1, ptr %to.1
  store ptr %value.2, ptr %to.2
  store ptr %value.3, ptr %to.3
  %payload = getelementptr i8, ptr %result, i64 8
  store i32 1, ptr %result
  store ptr @launch, ptr %payload
  ret i32 0
}
"""
STORE = """
@__TVMBackendParallelLaunch = external global ptr
define i32 @lathe_store_launcher(ptr %launcher) {
  store ptr %launcher, ptr @__TVMBackendParallelLaunch
  ret i32 0
}
"""


def host(target: Target) -> Any:
    """The TVM target of a CPU. LLVM's own vectoriser stays off: it takes the accumulators of a loop apart."""
    mcpu = target.mcpu or tvm.target.codegen.llvm_get_system_cpu()
    options = ["-vectorize-slp:bool=false"]
    attributes = [f"+{name}" for feature, name in DOTS.items() if feature in target.features]
    return tvm.target.Target({"kind": "llvm", "mcpu": mcpu, "mattr": attributes, "num-cores": max(1, target.cores),
                              "cl-opt": options})  # fmt: skip


def compile_function(func: Any, target: Any) -> Any:
    """Compile a PrimFunc; the module also holds a function that sets its thread launcher."""
    name = str(func.attrs["global_symbol"])
    return native(tvm.IRModule({name: func, SETTER: _setter()}), target)


def compile_scheduled(func: Any, name: str, target: Any) -> Any:
    """The same for a PrimFunc that TVM's own scheduling wrote: all of TVM's passes run."""
    module = tvm.IRModule({name: func.with_attr("global_symbol", name), SETTER: _setter()})
    return tvm.compile(module, target)


def _setter() -> Any:
    pointer = tirx.Var("launcher", "handle")
    call = tirx.Evaluate(tirx.call_extern("int32", "lathe_store_launcher", pointer))
    pragma = tirx.AttrStmt(tvm.ir.StringImm("launcher"), "pragma_import_llvm", tvm.ir.StringImm(STORE), call)
    return tirx.PrimFunc([pointer], pragma).with_attr("global_symbol", SETTER)


def native(functions: Any, target: Any) -> Any:
    """Lower and compile an IRModule of explicit loops and vectors.

    TVM's default passes are for schedules still to be lowered; their simplifier also copies every bound value into its
    uses, which takes exponential time on straight-line code. Here only what code generation needs is run.
    """
    passes = tirx.transform
    steps = (
        passes.BindTarget(target.with_host(target)), passes.FlattenBuffer(), passes.VerifyMemory(),
        passes.AnnotateEntryFunc(), passes.SplitHostDevice(), passes.MakePackedAPI(),
        passes.BF16StorageLegalize(), passes.LowerTVMBuiltin(),
        passes.LowerIntrin(),
    )  # fmt: skip
    return tvm.get_global_func("target.build.llvm")(tvm.ir.transform.Sequential(list(steps))(functions), target)


def entry(module: Any, name: str) -> Callable[..., None]:
    """The function of a compiled or loaded module, its threads on torch's pool."""
    found_launcher = launcher()
    if found_launcher is not None:
        module[SETTER](ctypes.c_void_p(found_launcher[0]))
    found: Callable[..., None] = module[name]
    return found


@dataclass
class Stored:
    """Code that was loaded from a library file."""

    module: Any
    path: Path

    def export_library(self, path: str) -> None:
        """Copy the file."""
        shutil.copyfile(self.path, path)


def load_library(path: str, name: str) -> Callable[..., None]:
    """A function of a library written by `Kernel.library`; compiles no kernel."""
    return entry(load_module(path), name)


def load_module(path: str) -> Any:
    """A library as a module."""
    return tvm.runtime.load_module(str(path))


@functools.cache
def launcher() -> tuple[int, Any] | None:
    """Address and owner of the launcher on torch's OpenMP pool, None if there is no such pool in this process."""
    openmp = _openmp()
    if openmp is None:
        return None
    addresses = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p).value for name in OPENMP]
    probe = tirx.PrimFunc([], tirx.Evaluate(tirx.IntImm("int32", 0))).with_attr("global_symbol", "probe")
    lines = native(tvm.IRModule({"probe": probe}), tvm.target.Target("llvm")).inspect_source("ll").splitlines()
    layout = "\n".join(line for line in lines if line.startswith("target "))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launcher.ll"
        path.write_text(layout + LAUNCHER)
        module = tvm.runtime.load_module(str(path))
        function = module["launcher"]
    return int(function(*addresses)), module  # the module owns the code


def _openmp() -> Any:
    import torch

    folder = Path(torch.__file__).parent
    candidates = [*(folder / "lib").glob("libgomp*.so*"), *(folder.parent / "torch.libs").glob("libgomp*.so*")]
    for path in (None, *map(str, candidates)):
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in OPENMP):
            return library
    return None
