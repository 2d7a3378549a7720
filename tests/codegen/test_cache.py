"""Artefacts: what comes back, and that nothing damaged, foreign or hostile ever does."""

import copy
import json
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from torchlathe import targets
from torchlathe.codegen import cache
from torchlathe.codegen.base import Destination, Kernel, Schedule
from torchlathe.codegen.cache import load, read_report
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.graph_json import decode_value, encode_value
from torchlathe.codegen.lower import lower_eager, lower_unmeasured
from torchlathe.codegen.weights import decode_tensors, encode_tensors
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import ArtefactError, InputError

CPU = targets.get("cpu")
Pair = namedtuple("Pair", "left right")


def build(model, args, dynamic_shapes=None, lower=lower_unmeasured, report=None):
    program = capture(model.eval(), args, dynamic_shapes=dynamic_shapes)
    return Executable(program, lower(program, CPU), model=model, report=report)


def identical(found, wanted):
    a, b = pytree.tree_flatten(found), pytree.tree_flatten(wanted)
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        if isinstance(y, torch.Tensor):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (x, y)))
        else:
            assert type(x) is type(y) and x == y


def complaint(executable, *args):
    with pytest.raises(InputError) as error:
        executable(*args)
    return str(error.value)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(self.down(torch.nn.functional.gelu(self.up(x))) + x)
        return {"hidden": h, "rest": (h.sum(-1), [h.shape[0] * 2, None])}


class Convs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())

    def forward(self, x):
        return Pair(self.body(x).mean((2, 3)), torch.max(x, dim=1))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(10, 6), torch.nn.Linear(6, 10)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.tensor([[float("inf"), -0.0, 1.5]]).expand(4, 3))

    def forward(self, ids):
        return self.head(self.embed(ids)), self.table + 1, ids.to(torch.bfloat16) * float("-inf")


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total.add_(x)
        return self.total * 2


CASES = {
    "block": (Block, lambda: (torch.randn(5, 8),), None),
    "dynamic": (Block, lambda: (torch.randn(5, 8),), ({0: Dim("n", min=2, max=64)},)),
    "convs": (Convs, lambda: (torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),), None),
    "tied": (Tied, lambda: (torch.randint(10, (4, 3)),), None),
    "bf16": (lambda: torch.nn.Linear(8, 8).bfloat16(), lambda: (torch.randn(3, 8).bfloat16(),), None),
}


@pytest.mark.parametrize("lower", [lower_eager, lower_unmeasured])
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_executable_is_the_saved_one(tmp_path, case, lower):
    torch.manual_seed(0)
    make, inputs, dynamic = CASES[case]
    args = inputs()
    report = {"model": case, "notes": ["kept"], "counts": {"eager fallbacks": 0}}
    saved = build(make(), args, dynamic, lower, report)
    saved.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    identical(loaded(*args), saved(*args))
    assert loaded.source == saved.source and loaded.program.text() == saved.program.text()
    assert [c.kernel.backend for c in loaded.choices] == [c.kernel.backend for c in saved.choices]
    assert loaded.report == report == read_report(tmp_path / "a") and loaded.counts == saved.counts
    assert complaint(loaded, args[0][..., :2]) == complaint(saved, args[0][..., :2])
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dynamic_sizes_and_their_limits_survive(tmp_path):
    saved = build(Block(), (torch.randn(5, 8),), ({0: Dim("n", min=2, max=64)},))
    saved.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    for size in (1, 9, 64):
        x = torch.randn(size, 8)
        identical(loaded(x), saved(x))
    for bad in (torch.randn(65, 8), torch.randn(5, 9), torch.randn(5, 8).double(), 3):
        assert complaint(loaded, bad) == complaint(saved, bad)


def test_divisibility_survives(tmp_path):
    class Halves(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] % 2 == 0 else x

    build(Halves(), (torch.ones(6, 4),), ({0: Dim.AUTO},)).save(tmp_path / "a")
    assert load(tmp_path / "a")(torch.ones(8, 4)).sum() == 64
    with pytest.raises(InputError, match="Mod"):
        load(tmp_path / "a")(torch.ones(7, 4))


def test_tied_weights_are_stored_once_and_come_back_as_one():
    weight = torch.randn(1000, 8)
    data, index = encode_tensors({"embed": weight, "head": torch.nn.Parameter(weight), "rows": weight[:500]})
    found = decode_tensors(data, index)
    assert found["embed"] is found["head"] and found["rows"].shape == (500, 8)
    assert len(data) < 1.6 * weight.nbytes


def test_state_continues_where_it_was_saved(tmp_path):
    saved = build(Counter(), (torch.ones(3),))
    saved(torch.ones(3))
    saved.save(tmp_path / "a")
    loaded = load(tmp_path / "a")
    for executable in (saved, loaded):
        torch.testing.assert_close(executable(torch.ones(3)), torch.full((3,), 4.0))
    other = load(tmp_path / "a")  # its buffer is its own
    torch.testing.assert_close(other(torch.ones(3)), torch.full((3,), 4.0))


def test_no_model_is_behind_a_loaded_executable(tmp_path):
    saved = build(Block(), (torch.randn(5, 8),))
    assert isinstance(saved.norm, torch.nn.LayerNorm)
    saved.save(tmp_path / "a")
    with pytest.raises(AttributeError, match="'norm': it was loaded from a file"):
        _ = load(tmp_path / "a").norm


def test_loading_traces_and_compiles_nothing(tmp_path, monkeypatch):
    saved = with_library(build(Block(), (torch.randn(5, 8),), ({0: Dim("n", min=2, max=64)},)))
    saved.save(tmp_path / "a")

    def forbidden(*args, **kwargs):
        raise AssertionError("loading must not trace or compile")

    monkeypatch.setattr(torch.export, "export", forbidden)
    monkeypatch.setattr(torch.fx.experimental.proxy_tensor, "make_fx", forbidden)
    monkeypatch.setattr(cache, "_tvm", forbidden)
    monkeypatch.setattr(cache, "_load_function", lambda data, name: gelu_into)
    x = torch.randn(6, 8)
    found = load(tmp_path / "a")(x)
    assert type(found) is type(saved(x))
    identical(found, saved(x))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(8, 8)[1::2, ::3],
        torch.randn(1, 3).expand(5, 3),
        torch.randn(3, dtype=torch.complex128),
        torch.randn(2, 3, dtype=torch.complex64).conj(),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.tensor([float("nan"), -0.0, float("inf")]),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.arange(5).to(torch.uint16),
    ],
    ids=lambda t: f"{t.dtype} {list(t.shape)}".replace("torch.", ""),
)
def test_every_kind_of_weight_keeps_its_bits(tensor):
    data, index = encode_tensors({"w": tensor})
    found = decode_tensors(data, index)["w"]
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    a, b = (t.resolve_conj().contiguous().flatten() for t in (found, tensor))
    assert not a.numel() or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_weights_without_a_stored_form_are_named():
    for weight in (torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)):
        with pytest.raises(ArtefactError, match="the weight gate"):
            encode_tensors({"gate": weight})


def test_values_of_arguments_survive_exactly():
    values = [None, True, 3, -(2**62), "aten", 0.1, float("inf"), -0.0, 1e-320, 2 + 3j, torch.bfloat16, torch.strided,
              torch.channels_last, torch.device("cpu"), slice(None, 3), [1, (2, [3.5])], ()]  # fmt: skip
    found = decode_value(json.loads(json.dumps(encode_value(values))))
    assert repr(found) == repr(values)
    assert str(decode_value(encode_value(float("nan")))) == "nan"


# --- compiled kernels


def gelu_into(value, buffer):
    buffer.copy_(torch.nn.functional.gelu(value))


def with_library(executable):
    """Put a kernel that pretends to be compiled in the place of gelu."""
    choices = list(executable.choices)
    for number, choice in enumerate(choices):
        if [str(n.target) for n in choice.region.nodes] == ["aten.gelu.default"]:
            value = choice.region.nodes[0].meta["val"]
            shape = tuple(s if isinstance(s, int) else (0, d) for d, s in enumerate(value.shape))
            kernel = Kernel(
                "rows_gelu", "tvm", gelu_into, (Destination(shape, value.dtype),), schedule=Schedule("rows")
            )
            kernel.library = lambda path: Path(path).write_bytes(b"\x7fELF not really")
            choices[number] = copy.copy(choice)
            choices[number].kernel = kernel
    return Executable(executable.program, choices, report=executable.report)


@pytest.fixture
def with_kernel(tmp_path):
    saved = with_library(build(Block(), (torch.randn(5, 8),), lower=lower_eager, report={"notes": []}))
    assert "tvm" in [c.kernel.backend for c in saved.choices]
    saved.save(tmp_path / "a")
    return saved, tmp_path / "a"


class StandIn:
    """A tvm backend that lowers gelu without tvm."""

    name = "tvm"

    def supports(self, region, target):
        return None

    def lower(self, region, target, schedule):
        assert schedule == Schedule("rows")
        return Kernel("again", "tvm", gelu_into, (Destination((5, 16), torch.float32),), schedule=schedule)


def test_kernels_are_loaded_from_their_library(with_kernel, monkeypatch):
    saved, path = with_kernel
    seen = []
    monkeypatch.setattr(cache, "_load_function", lambda data, name: seen.append((data, name)) or gelu_into)
    loaded, x = load(path), torch.randn(5, 8)
    identical(loaded(x), saved(x))
    assert seen == [(b"\x7fELF not really", "rows_gelu")] and loaded.counts.get("recompilations", 0) == 0
    loaded.save(path.with_name("b"))
    assert path.read_bytes() == path.with_name("b").read_bytes()


@pytest.mark.parametrize("reason", ["fingerprint", "version", "asked"])
def test_kernels_of_another_machine_are_compiled_again_and_counted(with_kernel, monkeypatch, reason):
    saved, path = with_kernel
    monkeypatch.setattr(cache, "_load_function", lambda data, name: pytest.fail("foreign code was loaded"))
    monkeypatch.setattr(cache, "_tvm", lambda program: StandIn())
    if reason == "fingerprint":
        monkeypatch.setattr(targets, "fingerprint", lambda target: "0" * 64)
    if reason == "version":
        here = cache.versions()
        monkeypatch.setattr(cache, "versions", lambda: {**here, "tvm": "9.9"})
    loaded, x = load(path, native=reason != "asked"), torch.randn(5, 8)
    identical(loaded(x), saved(x))
    assert loaded.counts["recompilations"] == loaded.report["counts"]["recompilations"] == 1
    assert bool([n for n in loaded.report["notes"] if "compiled again" in n]) == (reason != "asked")


def test_without_tvm_its_regions_run_eagerly_and_are_counted(with_kernel, monkeypatch):
    saved, path = with_kernel
    monkeypatch.setitem(sys.modules, "torchlathe.codegen.tvm.build", None)
    monkeypatch.setitem(sys.modules, "torchlathe.codegen.tvm.backend", None)
    loaded, x = load(path), torch.randn(5, 8)
    identical(loaded(x), saved(x))
    assert loaded.counts["eager fallbacks"] == 1
    assert [n for n in loaded.report["notes"] if "tvm" in n]


def test_kernel_files_are_private_checked_and_replaced_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "cache"))
    with cache.library_file(b"code") as path:
        assert path.read_bytes() == b"code" and path.is_relative_to(tmp_path / "cache")
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.write_bytes(b"evil")
    with pytest.warns(UserWarning, match="damaged"), cache.library_file(b"code") as again:
        assert again == path and path.read_bytes() == b"code"
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(b"code")
    path.symlink_to(tmp_path / "elsewhere")
    with cache.library_file(b"code") as again:
        assert again.read_bytes() == b"code" and not again.is_symlink()


def test_an_unwritable_cache_is_replaced_by_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "file"))
    with cache.library_file(b"code") as path:
        assert path.read_bytes() == b"code"
    assert not path.exists()


def test_programs_without_a_stored_form_say_why(tmp_path):
    class Branch(torch.nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    with pytest.raises(ArtefactError, match="control flow"):
        build(Branch(), (torch.ones(3),), lower=lower_eager).save(tmp_path / "a")
    saved = build(Counter(), (torch.ones(3),))
    saved.program.weights["alias"] = saved.program.weights["total"][:1]
    with pytest.raises(ArtefactError, match="total shares memory with alias"):
        saved.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_two_processes_load_at_the_same_time(with_kernel, tmp_path):
    saved, path = with_kernel
    x = torch.linspace(-1, 1, 40).reshape(5, 8)
    code = f"""
import os, torch
from torchlathe.codegen import cache
os.environ["TORCHLATHE_CACHE"] = {str(tmp_path / "cache")!r}
def fake(data, name):
    with cache.library_file(data) as file:
        assert file.read_bytes() == data and file.is_relative_to({str(tmp_path / "cache")!r})
    return lambda value, buffer: buffer.copy_(torch.nn.functional.gelu(value))
cache._load_function = fake
x = torch.linspace(-1, 1, 40).reshape(5, 8)
for _ in range(5):
    found = cache.load({str(path)!r})(x)["hidden"]
print(found.double().sum().item())
"""
    workers = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    for worker in workers:
        out, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        assert float(out) == saved(x)["hidden"].double().sum().item()


def test_read_report_touches_no_kernel(with_kernel, monkeypatch):
    _, path = with_kernel
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the library is the last part
    path.write_bytes(data)
    assert read_report(path) == {"notes": []}
    with pytest.raises(ArtefactError, match="library:0 does not match"):
        load(path)


@pytest.mark.parametrize("dynamic", [None, ({0: Dim("n", min=2, max=64)},)], ids=["static", "dynamic"])
def test_a_compiled_kernel_survives_with_its_machine_code(tmp_path, dynamic):
    pytest.importorskip("tvm")
    from torchlathe.codegen.partition import partition
    from torchlathe.codegen.select import Choice
    from torchlathe.codegen.tvm.backend import TvmBackend

    class Pointwise(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) * 2 + 1

    program = capture(Pointwise(), (torch.randn(5, 8),), dynamic_shapes=dynamic)
    backend = TvmBackend()
    [region] = partition(program, [backend], CPU)
    kernel = backend.lower(region, CPU, next(iter(backend.space(region, CPU))))
    Executable(program, [Choice(region, kernel)]).save(tmp_path / "a")
    loaded, again = load(tmp_path / "a"), load(tmp_path / "a", native=False)
    assert [e.choices[0].kernel.backend for e in (loaded, again)] == ["tvm", "tvm"]
    assert "recompilations" not in loaded.counts and again.counts["recompilations"] == 1
    for size in (5, 9) if dynamic else (5,):
        x = torch.randn(size, 8)
        for executable in (loaded, again):
            assert torch.equal(executable(x), torch.relu(x) * 2 + 1)
