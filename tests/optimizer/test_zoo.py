"""Every model of the zoo through every door: the answers must be eager's."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils import _pytree as pytree

import torchlathe
from torchlathe.passes.capture import capture
from torchlathe.passes.errors import CaptureError
from torchlathe.passes.verify import difference, well_formed

# Eager takes torch's fused encoder kernel here, or draws numbers through other kernels; capture keeps single operators.
ROUNDS_DIFFERENTLY = {"beit", "siglip", "torch-encoder"}


def leaves(result):
    """Flat tensors and constants of a result; transformers' caches count by their tensors."""
    found = []
    for leaf in pytree.tree_leaves(result):
        layers = getattr(leaf, "layers", None)
        found += [leaf] if layers is None else [t for layer in layers for t in (layer.keys, layer.values)]
    return found


@pytest.fixture(autouse=True)
def fresh():
    """No graph of one model may serve another, and memory is given back."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def test_size_of_the_zoo(zoo):
    parts = (zoo.encoders(), zoo.decoders(), zoo.pairs(), zoo.images(), zoo.several_modes())
    from_configurations = sum(len(part) for part in parts)
    assert from_configurations >= 22
    assert len(zoo.models()) - from_configurations >= 10


@torch.no_grad()
def test_capture_gives_the_same_answers(zoo, captured):
    model, args, kwargs = zoo.models()[captured]()
    wanted = model(*args, **kwargs)
    program = capture(model, args, kwargs)
    well_formed(program)
    found, after = program(*args, **kwargs), model(*args, **kwargs)
    assert difference(leaves(after), leaves(wanted))[0] == 0, "capture changed the model"
    assert type(found) is type(wanted)
    found, wanted = leaves(found), leaves(wanted)
    if captured in ROUNDS_DIFFERENTLY:
        size, place = difference(found, wanted)
        assert size <= 1, place
    else:
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) if torch.is_tensor(b) else a == b for a, b in zip(found, wanted, strict=True))


def test_capture_refuses_with_the_way_out(zoo, beyond):
    model, args, kwargs = zoo.models()[beyond]()
    with pytest.raises(CaptureError, match=r'torch\.compile\(model, backend="torchlathe"\)'):
        capture(model, args, kwargs)


@torch.no_grad()
def test_optimize(zoo, captured):
    model, args, kwargs = zoo.models()[captured]()
    wanted = model(*args, **kwargs)
    fast = torchlathe.optimize(model, args, kwargs)
    found = fast(*args, **kwargs)
    assert type(found) is type(wanted)
    size, place = difference(leaves(found), leaves(wanted))
    assert size <= 1, f"{place} deviates {size:.3g} times the tolerance"


@torch.no_grad()
def test_compile_door(zoo, any_model):
    model, args, kwargs = zoo.models()[any_model]()
    wanted = model(*args, **kwargs)
    found = torch.compile(model, backend="torchlathe")(*args, **kwargs)
    assert type(found) is type(wanted)
    size, place = difference(leaves(found), leaves(wanted))
    assert size <= 1, f"{place} deviates {size:.3g} times the tolerance"
