"""The operators that a stored graph may name: a rule for ATen, a literal table of Python functions, nothing else."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from ..passes.errors import ArtefactError
from ..passes.ops import NAMESPACE, define

_OVERLOAD = re.compile(r"([a-z]+)\.(\w+)\.(\w+)", re.ASCII)

# ATen operators with a leading underscore are internal and refused, except these, which traces contain.
UNDERSCORED = frozenset(
    """__and__ __or__ __xor__ __lshift__ __rshift__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async
    _assert_scalar _assert_tensor_metadata _cdist_forward _conj _conj_physical _convolution _efficientzerotensor
    _embedding_bag _embedding_bag_forward_only _euclidean_dist _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm
    _grouped_mm _int_mm _is_all_true _is_any_true _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex
    _linalg_svd _local_scalar_dense _log_softmax _native_batch_norm_legit_no_training _native_multi_head_attention
    _neg_view _pad_circular _pad_enum _pdist_forward _prelu_kernel _reshape_alias _safe_softmax _scaled_mm
    _scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _stack
    _to_copy _trilinear _unsafe_index _unsafe_masked_index _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_int4pack_mm_for_cpu
    _weight_int8pack_mm _weight_norm _weight_norm_interface""".split()
)
# Immutable by their schema, yet they read files, pin host memory or touch the state of the process.
REFUSED = frozenset(("from_file", "pin_memory", "is_pinned", "record_stream", "set_data", "manual_seed", "seed",
                     "retain_grad", "save", "warn", "wait", "get_gradients"))  # fmt: skip
WITHOUT_RESULT = frozenset(("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range",
                            "sym_constrain_range_for_size"))  # fmt: skip
MKLDNN = frozenset(("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight",
                    "_reorder_convolution_weight"))  # fmt: skip

_OPERATOR = """getitem add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ invert
lshift rshift truth""".split()
_MATH = "floor ceil trunc sqrt".split()
_TORCH = "sym_max sym_min sym_not sym_int sym_float sym_ite sym_sum sym_sqrt _sym_sqrt".split()
FUNCTIONS: dict[str, Callable[..., Any]] = (
    {f"operator.{n}": getattr(operator, n) for n in _OPERATOR}
    | {f"math.{n}": getattr(math, n) for n in _MATH}
    | {f"torch.{n}": getattr(torch, n) for n in _TORCH if hasattr(torch, n)}
)
_NAMES = {function: name for name, function in FUNCTIONS.items()}


def name_of(target: Any) -> str:
    """The stored name of an operator. Raises ArtefactError for one that `operator_of` would refuse."""
    if isinstance(target, torch._ops.OpOverload):
        if reason := _reason_against(target):
            raise _refusal(str(target), reason)
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise _refusal(str(target), "control flow with sub-graphs has no stored form")
    name = _NAMES.get(target)
    if name is None:
        raise _refusal(str(target), "it is neither an ATen operator nor in the table of Python functions")
    return name


def operator_of(name: str) -> Callable[..., Any]:
    """The operator of a stored name. Raises ArtefactError for anything outside the allow-list."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    found = _OVERLOAD.fullmatch(name)
    if found is None or found[1] not in ("aten", "mkldnn", NAMESPACE):
        raise _refusal(name, "it is not in the allow-list")
    if found[1] == NAMESPACE:
        define()
    packet = getattr(getattr(torch.ops, found[1]), found[2], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or found[3] not in packet.overloads():
        raise ArtefactError(f"torch {torch.__version__} has no operator {name}",
                            next_step="load with the torch version that wrote the file, or optimize again")  # fmt: skip
    target: torch._ops.OpOverload = getattr(packet, found[3])
    if reason := _reason_against(target):
        raise _refusal(name, reason)
    return target


def _reason_against(target: torch._ops.OpOverload) -> str | None:
    schema = target._schema
    name = schema.name.split("::")[1]
    if target.namespace == "mkldnn":
        return None if name in MKLDNN else "it is not in the allow-list"
    if target.namespace not in ("aten", NAMESPACE):
        return f"operators of {target.namespace} are not in the allow-list"
    if schema.is_mutable:
        return "it writes into its arguments"
    if name in REFUSED:
        return "it has side effects"
    if target.namespace == "aten" and name.startswith("_") and name not in UNDERSCORED:
        return "it is internal and not in the allow-list"
    if not schema.returns and name not in WITHOUT_RESULT:
        return "it returns nothing, so all it does are side effects"
    if not any("Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns)) and name not in WITHOUT_RESULT:
        return "it does not compute on tensors"
    return None


def _refusal(name: str, reason: str) -> ArtefactError:
    return ArtefactError(f"a stored graph may not hold the operator {name}: {reason}")
