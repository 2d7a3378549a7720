"""Tensors as safetensors bytes: shared ones once, with the strides and dtypes that they had in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..passes.errors import ArtefactError

Json = Any


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, Json]:
    """Safetensors bytes of all tensors, and for each name where its tensor is and how it lay in memory.

    Equal views of one storage (tied weights) are stored once and come back as one tensor. A tensor comes back with its
    strides if they are a permutation of a dense layout; broadcast dimensions are stored once; other gaps are closed.

    Raises:
        ArtefactError: a tensor is sparse, quantized, a subclass, or of a dtype that safetensors lacks.
    """
    stored: dict[str, torch.Tensor] = {}
    index: dict[str, Json] = {}
    seen: dict[Any, Json] = {}
    for name, tensor in tensors.items():
        identity = _identity(name, tensor)
        if identity not in seen:
            key = str(len(stored))
            stored[key], seen[identity] = _encode(name, tensor, key)
        index[name] = seen[identity]
    try:
        return save(stored), index
    except (SafetensorError, KeyError, ValueError) as error:
        kinds = sorted({str(t.dtype) for t in tensors.values()})
        raise ArtefactError(f"safetensors cannot store these weights ({', '.join(kinds)}): {error}") from error


def _identity(name: str, tensor: torch.Tensor) -> Any:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise ArtefactError(f"the weight {name} is a {type(tensor).__name__}: only plain tensors have a stored form")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ArtefactError(f"the weight {name} is {tensor.layout} or quantized: only dense tensors have a stored form",
                            next_step="call .to_dense() or .dequantize() on it before optimize")  # fmt: skip
    if tensor.device.type not in ("cpu", "cuda"):
        raise ArtefactError(f"the weight {name} is on {tensor.device}: only CPU and CUDA tensors have a stored form")
    if not tensor.numel():
        return name
    flags = tensor.is_conj(), tensor.is_neg()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, flags


def _encode(name: str, tensor: torch.Tensor, key: str) -> tuple[torch.Tensor, Json]:
    plain = tensor.detach().resolve_conj().resolve_neg()
    for dim, stride in enumerate(plain.stride()):
        if stride == 0 and plain.shape[dim] > 1:
            plain = plain.narrow(dim, 0, 1)
    strides = plain.stride()
    order = sorted(range(plain.dim()), key=lambda d: (-strides[d], d))
    entry = [key, list(tensor.shape), order, str(tensor.dtype).removeprefix("torch."), str(tensor.device)]
    dense = plain.permute(order).contiguous().cpu()
    if dense.is_complex():
        dense = torch.view_as_real(dense)
    # a copy of its own: safetensors refuses tensors that share memory, which views of one storage do
    return dense.clone() if dense.data_ptr() == tensor.data_ptr() else dense, entry


def decode_tensors(data: bytes, index: Json) -> dict[str, torch.Tensor]:
    """The inverse of `encode_tensors`.

    Raises:
        ArtefactError: the bytes are not safetensors.
        ValueError, KeyError, TypeError, RuntimeError: index and bytes contradict each other.
    """
    try:
        stored = load(data)
    except SafetensorError as error:
        raise ArtefactError(f"the weights are not in the safetensors format: {error}") from error
    made: dict[str, torch.Tensor] = {}
    found = {}
    for name, (key, shape, order, dtype, device) in index.items():
        if key not in made:
            made[key] = _decode(stored[key], shape, order, dtype, device)
        found[name] = made[key]
    return found


def _decode(stored: torch.Tensor, shape: list[int], order: list[int], dtype: str, device: str) -> torch.Tensor:
    tensor = stored.clone()  # on memory that torch allocated, which is aligned for vector loads
    if dtype.startswith("complex"):
        tensor = torch.view_as_complex(tensor)
    if str(tensor.dtype) != f"torch.{dtype}" or sorted(order) != list(range(tensor.dim())):
        raise ValueError(f"a tensor of {tensor.dtype} is described as {dtype}")
    inverse = [order.index(d) for d in range(len(order))]
    tensor = tensor.permute(inverse).expand(shape)
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"{device} is no device of this format")
    return tensor.to(device)
