"""Structures of inputs and outputs (pytree specs) as JSON. No module is imported because a file names it.

A class is found again if it is registered with torch's pytree, or if its package is already imported and shows it.
An output class that is not found becomes `Fields`: the same field names, by attribute, key and position.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque, namedtuple
from collections.abc import Iterable
from typing import Any

from torch.utils import _pytree as pytree

from ..passes.errors import ArtefactError
from .graph_json import decode_value, encode_value

Json = Any
PLAIN: dict[str, Any] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict, "deque": deque}


class Fields(dict[str, Any]):
    """An output whose class is not imported: fields by attribute (``out.logits``), key or position (``out[0]``)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no field {name!r}; it has {', '.join(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return dict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in the order of the fields."""
        return tuple(self.values())


def encode_structure(spec: pytree.TreeSpec) -> Json:
    """JSON of a pytree spec. Raises ArtefactError for a structure that has no stored form."""
    if spec.is_leaf():
        return "*"
    children = [encode_structure(c) for c in spec.children()]
    for name, kind in PLAIN.items():
        if spec.type is kind:
            return [name, encode_value(spec.context), children]
    if spec.type is namedtuple:
        return ["namedtuple", [_name(spec.context), list(spec.context._fields)], children]
    if spec.type is Fields:
        name, context = spec.context
        return ["class", [name, encode_value(context)], children]
    if spec.type not in pytree.SUPPORTED_NODES:
        raise ArtefactError(f"the class {_name(spec.type)} is not registered with torch's pytree")
    return ["class", [_name(spec.type), encode_value(spec.context)], children]


def decode_structure(stored: Json, *, inputs: bool) -> pytree.TreeSpec:
    """The inverse of `encode_structure`.

    Args:
        inputs: the structure is that of a call, whose classes must be known: a caller passes their instances.

    Raises:
        ArtefactError: a class cannot be found; the error names the package to import.
        ValueError, KeyError, TypeError: the content contradicts the format.
    """
    if stored == "*":
        return pytree.tree_structure(0)
    kind, context, rest = stored
    children = [decode_structure(c, inputs=inputs) for c in rest]
    if kind in PLAIN:
        found = decode_value(context)
        if kind in ("dict", "OrderedDict") and len(found) != len(children):
            raise ValueError("a dictionary with more or fewer values than keys")
        return pytree.TreeSpec(PLAIN[kind], found, children)
    if kind == "namedtuple":
        name, fields = context
        return pytree.TreeSpec(namedtuple, _namedtuple(name, fields, len(children), inputs), children)
    if kind != "class":
        raise ValueError(f"no structure is a {str(kind)[:80]}")
    name, given = context
    found, cls = decode_value(given), _known(name)
    if cls is not None and cls in pytree.SUPPORTED_NODES:
        return pytree.TreeSpec(cls, found, children)
    names = _field_names(found, len(children))
    if inputs or names is None:
        raise _unknown(name)
    _register_fields()
    return pytree.TreeSpec(Fields, (name, found), children)


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _known(name: str) -> Any:
    """The class of that name if it is registered, or shown by a package that is imported already."""
    for cls in pytree.SUPPORTED_NODES:
        if isinstance(cls, type) and _name(cls) == name:
            return cls
    module, _, path = name.partition(":")
    top, *inner = module.split(".")
    found = sys.modules.get(module) or sys.modules.get(top)
    for part in [*([] if module in sys.modules else inner), *path.split(".")]:
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _namedtuple(name: str, fields: list[str], size: int, inputs: bool) -> Any:
    found = _known(name)
    if found is not None and issubclass(found, tuple) and list(getattr(found, "_fields", ())) == fields:
        return found
    if inputs:
        raise _unknown(name)
    if len(fields) != size:
        raise ValueError("a named tuple with more or fewer values than fields")
    made: Any = namedtuple(name.rpartition(".")[2].rpartition(":")[2], fields)  # type: ignore[misc]
    made.__module__ = name.partition(":")[0]
    return made


def _unknown(name: str) -> ArtefactError:
    package = name.partition(":")[0].partition(".")[0]
    return ArtefactError(f"the file needs the class {name.replace(':', '.')}, which is not imported",
                         next_step=f"import {package} before loading")  # fmt: skip


def _field_names(context: Any, size: int) -> list[str] | None:
    """Field names in the context of a registered class: its keys, or the first list in it (dataclasses)."""
    if not isinstance(context, (list, tuple)):
        return None
    nested = next((c for c in context if isinstance(c, (list, tuple)) and len(c) == size), None)
    for names in (context, nested):
        if names is not None and len(names) == size and all(isinstance(n, str) for n in names):
            return list(names)
    return None


def _register_fields() -> None:
    # on first need instead of at import; the same class again changes nothing
    if Fields not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(Fields, _flatten_fields, _build_fields)


def _flatten_fields(value: Fields) -> tuple[list[Any], Any]:
    return list(value.values()), ("", list(value))


def _build_fields(values: Iterable[Any], context: Any) -> Fields:
    values = list(values)
    return Fields(zip(_field_names(context[1], len(values)) or (), values, strict=True))
