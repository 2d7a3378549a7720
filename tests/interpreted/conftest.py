"""Kernels that Triton's interpreter runs on the CPU: with TRITON_INTERPRET=1 only, which compiling must not see."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
