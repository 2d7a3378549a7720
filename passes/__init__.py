"""The Program, the analyses and one file per rewrite. Pass classes are imported from here when first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exact.drop_copies import DropCopies as DropCopies
    from .exact.drop_dead import DropDead as DropDead
    from .exact.drop_masks import DropMasks as DropMasks
    from .exact.fold_adapters import FoldAdapters as FoldAdapters
    from .exact.fold_constants import FoldConstants as FoldConstants
    from .exact.fold_norm import FoldNorm as FoldNorm
    from .exact.fuse_attention import FuseAttention as FuseAttention
    from .exact.fuse_qkv import FuseQkv as FuseQkv
    from .exact.hoist_invariant import HoistInvariant as HoistInvariant
    from .exact.merge_common import MergeCommon as MergeCommon
    from .exact.merge_reparam import MergeReparam as MergeReparam
    from .exact.share_heads import ShareHeads as ShareHeads
    from .lossy.merge_frames import MergeFrames as MergeFrames
    from .lossy.merge_tokens import MergeTokens as MergeTokens
    from .lossy.prune_and_restore import PruneAndRestore as PruneAndRestore
    from .lossy.prune_tokens import PruneTokens as PruneTokens
    from .lossy.select_prompt import SelectPrompt as SelectPrompt

PASSES = {
    "DropCopies": ".exact.drop_copies",
    "DropDead": ".exact.drop_dead",
    "DropMasks": ".exact.drop_masks",
    "FoldAdapters": ".exact.fold_adapters",
    "FoldConstants": ".exact.fold_constants",
    "FoldNorm": ".exact.fold_norm",
    "FuseAttention": ".exact.fuse_attention",
    "FuseQkv": ".exact.fuse_qkv",
    "HoistInvariant": ".exact.hoist_invariant",
    "MergeCommon": ".exact.merge_common",
    "MergeReparam": ".exact.merge_reparam",
    "ShareHeads": ".exact.share_heads",
    "MergeFrames": ".lossy.merge_frames",
    "MergeTokens": ".lossy.merge_tokens",
    "PruneAndRestore": ".lossy.prune_and_restore",
    "PruneTokens": ".lossy.prune_tokens",
    "SelectPrompt": ".lossy.select_prompt",
}


def __getattr__(name: str) -> Any:
    if name not in PASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PASSES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PASSES])
