"""Damaged, foreign and hostile artefacts: each gets an ArtefactError, and nothing of them is run."""

import hashlib
import json
import os
import sys

import pytest
import torch

from torchlathe import targets
from torchlathe.codegen import operators
from torchlathe.codegen.cache import load, read_report
from torchlathe.codegen.container import HEAD, MAGIC, START, VERSION, Part, read_container, write_container
from torchlathe.codegen.executable import Executable
from torchlathe.codegen.lower import lower_unmeasured
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import ArtefactError


def build(model, args, report=None):
    program = capture(model.eval(), args)
    return Executable(program, lower_unmeasured(program, targets.get("cpu")), report=report)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "a"
    torch.manual_seed(0)
    build(torch.nn.Linear(2, 2), (torch.ones(1, 2),), report={"model": "Linear"}).save(path)
    return path.read_bytes()


def test_every_changed_byte_is_found(small, tmp_path):
    path = tmp_path / "a"
    for position in range(len(small)):
        mask = 0xFF if position % 2 else 1 << position % 7
        path.write_bytes(small[:position] + bytes([small[position] ^ mask]) + small[position + 1 :])
        with pytest.raises(ArtefactError):
            load(path)


def test_every_cut_and_extension_is_found(small, tmp_path):
    path = tmp_path / "a"
    for length in range(len(small)):
        path.write_bytes(small[:length])
        with pytest.raises(ArtefactError):
            load(path)
    for tail in (b"\0", b"more", small):
        path.write_bytes(small + tail)
        with pytest.raises(ArtefactError, match="cut or extended"):
            load(path)


def test_missing_and_foreign_files_and_other_versions_are_explained(small, tmp_path):
    with pytest.raises(ArtefactError, match="no file at"):
        load(tmp_path / "nothing")
    with pytest.raises(ArtefactError, match="no file at"):
        load(tmp_path)
    path = tmp_path / "a"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArtefactError, match="not a torchlathe artefact"):
        load(path)
    path.write_bytes(HEAD.pack(MAGIC, VERSION + 1, 5) + small[HEAD.size :])
    with pytest.raises(ArtefactError, match=f"format version {VERSION + 1}.*\n.*the torchlathe version that wrote it"):
        read_report(path)


def rewrite(path, change):
    """Change the JSON parts of an artefact and write it with correct checksums."""
    facts, parts = read_container(path)
    documents = {k: json.loads(p.data) for k, p in parts.items() if p.kind == "json"}
    change(documents)
    written = [
        Part(k, p.kind, json.dumps(documents[k]).encode() if k in documents else p.data) for k, p in parts.items()
    ]
    write_container(path, facts, written)


def seal(path, manifest, body):
    """A file with any manifest and a correct checksum over it."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    head = HEAD.pack(MAGIC, VERSION, len(text))
    path.write_bytes(head + hashlib.sha256(head + text).digest() + text + body)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[1].update(offset=0),
        lambda rows: rows[0].update(offset=-1),
        lambda rows: rows[0].update(size=2**63),
        lambda rows: rows[-1].update(size=10**30),
        lambda rows: rows[0].update(size=-5),
        lambda rows: rows[0].update(size=True),
        lambda rows: rows[0].update(size=1.0),
        lambda rows: rows[0].update(name=rows[1]["name"]),
        lambda rows: rows[0].update(kind="pickle"),
        lambda rows: rows[0].update(sha256=5),
        lambda rows: rows[0].update(extra=1),
        lambda rows: rows.reverse(),
        lambda rows: rows.append(dict(rows[0])),
        lambda rows: rows.clear(),
    ],
)
def test_hostile_part_tables_are_refused(small, tmp_path, change):
    length = HEAD.unpack(small[: HEAD.size])[2]
    manifest = json.loads(small[START : START + length])
    change(manifest["parts"])
    seal(tmp_path / "a", manifest, small[START + length :])
    with pytest.raises(ArtefactError):
        load(tmp_path / "a")


def test_hostile_manifests_are_refused(tmp_path):
    path = tmp_path / "a"
    for manifest in (
        b"",
        b"[" * 100_000,
        b"null",
        b'{"format": 1}',
        b'{"format": 1, "parts": [NaN]}',
        b"\xff\xfe",
        b"9" * 5000,
    ):
        seal(path, manifest, b"")
        with pytest.raises(ArtefactError):
            load(path)
    seal(path, {"format": VERSION, "parts": []}, b"")
    with pytest.raises(ArtefactError, match="contradict the format"):
        load(path)
    path.write_bytes(HEAD.pack(MAGIC, VERSION, 2**64 - 1) + bytes(32))
    with pytest.raises(ArtefactError, match="longer than the file"):
        load(path)


FORBIDDEN = ["aten.from_file.default", "aten._pin_memory.default", "aten.pin_memory.default", "aten.add_.Tensor",
             "aten.add.out", "aten.record_stream.default", "aten.manual_seed.default", "aten.__class__.default",
             "aten._copy_from.default", "aten._cufft_set_plan_cache_max_size.default", "aten.warn.default",
             "prims.svd.default", "os.system.default", "os.system", "builtins.eval", "operator.attrgetter",
             "torch.load", "aten.no_such_operator.default", "aten.relu.nope", "aten.relu", "", "operator.getitem.x",
             "aten.set_.source_Storage", "aten.format.default", "inductor.accumulate_grad_.default"]  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_operators_outside_the_allow_list_are_refused(small, tmp_path, name):
    (tmp_path / "a").write_bytes(small)

    def change(documents):
        node = next(n for n in documents["graph"]["nodes"] if n[0] == "call_function")
        assert node[2] == "aten.linear.default"
        node[2] = name

    rewrite(tmp_path / "a", change)
    with pytest.raises(ArtefactError, match=r"may not hold the operator|has no operator"):
        load(tmp_path / "a")


def test_what_is_saved_can_be_loaded():
    for op in (torch.ops.aten.add.Tensor, torch.ops.aten.sym_size.int, torch.ops.aten._softmax.default):
        assert operators.operator_of(operators.name_of(op)) is op
    for function in operators.FUNCTIONS.values():
        assert operators.operator_of(operators.name_of(function)) is function


def set_in(part, *keys, value):
    def change(documents):
        place = documents
        for key in (part, *keys)[:-1]:
            place = place[key]
        place[(part, *keys)[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("graph", "nodes", -1, 5, value={"x=__import__('os').system('true'), y": 1}),
        set_in("graph", "nodes", -1, 4, 0, value={"node": 99}),
        set_in("graph", "nodes", -1, 4, 0, value={"node": -1}),
        set_in("graph", "nodes", -1, 4, 0, value={"pickle": "gASVAA=="}),
        set_in("graph", "nodes", -1, 4, 0, value={"node": 0, "float": "1"}),
        set_in("graph", "nodes", -1, 1, value="a b"),
        set_in("graph", "nodes", -1, 3, 3, value=[-1, 2]),
        set_in("graph", "nodes", -1, 3, 3, value=[2**62, 2**62]),
        set_in("graph", "nodes", -1, 3, 3, value=["__import__('os')", 2]),
        set_in("graph", "nodes", -1, 3, 3, value=[["Pow", 10, ["Pow", 10, 10]], 2]),
        set_in("graph", "nodes", -1, 3, 2, value="meta"),
        set_in("graph", "nodes", -1, 0, value="call_module"),
        set_in("graph", "symbols", value={"s0; import os": [[True, True, True], [1, 2], 1]}),
        set_in("graph", "outputs", value=[]),
        set_in("graph", "state", value=[["nothing", 0]]),
        set_in("graph", "nodes", value={}),
        set_in("plan", "regions", value=[]),
        set_in("plan", "regions", 0, "nodes", value=[0]),
        set_in("plan", "regions", 0, "nodes", value=[-1]),
        set_in("plan", "counts", value=None),
        set_in("structure", "in", value="*"),
        set_in("structure", "out", value=["list", None, ["*", "*", "*"]]),
        set_in("structure", "out", value=["class", ["os:system", []], ["*"]]),
        set_in("tensors", value={}),
        set_in("tensors", "weight:weight", value=["nothing", [2, 2], [0, 1], "float32", "cpu"]),
        set_in("tensors", "weight:weight", 3, value="int64"),
        set_in("tensors", "weight:weight", 1, value=[2**40, 2**40]),
    ],
)
def test_hostile_contents_with_correct_checksums_are_refused(small, tmp_path, change):
    (tmp_path / "a").write_bytes(small)
    rewrite(tmp_path / "a", change)
    with pytest.raises(ArtefactError):
        load(tmp_path / "a")


def test_unknown_input_classes_name_the_package_to_import(tmp_path):
    build(torch.nn.ReLU(), (torch.randn(2),)).save(tmp_path / "a")
    structure = [
        "tuple",
        None,
        [["tuple", None, [["class", ["nopackage.models:Batch", ["x"]], ["*"]]]], ["dict", [], []]],
    ]
    rewrite(tmp_path / "a", lambda parts: parts["structure"].update({"in": structure}))
    with pytest.raises(ArtefactError, match="import nopackage before loading"):
        load(tmp_path / "a")
    assert "nopackage" not in sys.modules


def test_saving_replaces_the_file_whole_or_leaves_it(tmp_path, monkeypatch, small):
    path = tmp_path / "a"
    path.write_bytes(small)
    saved = build(torch.nn.Linear(2, 2), (torch.ones(1, 2),))

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved.save(path)
    assert path.read_bytes() == small and [p.name for p in tmp_path.iterdir()] == ["a"]
