"""Tests over every model of the zoo."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from scripts import load


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """The module bench/zoo.py."""
    load("zoo_nets")
    return load("zoo")


@pytest.fixture(scope="session")
def fuzz() -> ModuleType:
    """The module bench/fuzz.py."""
    for part in ("fuzz_draws", "fuzz_ops"):
        load(part)
    return load("fuzz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take `captured` on each model that capture accepts, `beyond` on the others, `any_model` on all.

    `captured` and `any_model` leave most models to the second stage.
    """
    load("zoo_nets")
    zoo = load("zoo")
    names = list(zoo.models())
    inside = [n for n in names if n not in zoo.BEYOND_CAPTURE]
    sets = {
        "beyond": list(zoo.BEYOND_CAPTURE),
        "captured": [staged(n) for n in inside],
        "any_model": [staged(n) for n in names],
    }
    for fixture in sets.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(fixture, sets[fixture])


FIRST_STAGE = {"bert-eager-attention", "llama-eager-attention", "resnet", "parallel-conv", "qk-norm-vit", "lstm-tagger",
               "dict-in-dataclass-out", "shape-shuffle", "fourier-mixer", "branching"}  # fmt: skip


def staged(name: str) -> Any:
    """The model's name as a test parameter, marked slow unless it is in the first stage."""
    return name if name in FIRST_STAGE else pytest.param(name, marks=pytest.mark.slow)
