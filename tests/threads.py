"""Calls at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable


def in_threads(work: Callable[[int], None], numbers: Iterable[int]) -> None:
    """Run `work` on each number in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=work, args=(k,)) for k in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
