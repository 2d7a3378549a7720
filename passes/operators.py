"""Operators that do one kind of thing, by the names of graphs."""

from __future__ import annotations

import torch

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten.special_softmax.default, aten._safe_softmax.default}
CASTS = {aten._to_copy.default, aten.to.dtype, aten.to.other, aten.to.device, aten.type_as.default}
COPIES = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
         aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints,
         aten.unflatten.int, aten.expand.default}  # fmt: skip
TURNS = {aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default}
LIKE = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}
DROPOUT = {aten.dropout.default, aten.feature_dropout.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default,
            aten.einsum.default}  # fmt: skip
ADD, SUB = {aten.add.Tensor, aten.add.Scalar}, {aten.sub.Tensor, aten.sub.Scalar}
MUL, DIV = {aten.mul.Tensor, aten.mul.Scalar}, {aten.div.Tensor, aten.div.Scalar}
FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
