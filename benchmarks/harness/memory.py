"""Memory of process trees."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from benchmarks.harness.cpu import process_tree

MEGABYTE = 1_000_000


def proportional_bytes(roots: Iterable[int]) -> int:
    """Proportional set size (PSS) of the trees: pages that n processes share count 1/n for each."""
    return sum(_memory(process)[0] for root in roots for process in process_tree(root))


def unique_bytes(pid: int) -> int:
    """Unique set size (USS) of one process: what would be free if it ended."""
    return _memory(psutil.Process(pid))[1]


def _memory(process: psutil.Process) -> tuple[int, int]:
    """PSS and USS in bytes; zeros for a process that has ended."""
    try:
        memory = process.memory_full_info()
    except psutil.NoSuchProcess:
        return 0, 0
    return int(memory.pss), int(memory.uss)
