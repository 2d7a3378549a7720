"""Makes this source tree importable as `torchlathe`, installed or not. Imported for that effect alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# transformers looks for a package called kernels, and would find the script of that name beside this one
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

if "torchlathe" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "torchlathe", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert _spec and _spec.loader
    sys.modules["torchlathe"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["torchlathe"])
