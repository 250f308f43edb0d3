"""What else used the processor while something was measured.

A round is only worth keeping if the machine was quiet: decoding threads spin at barriers, so that a second
busy process costs far more than its share of the time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Seconds since the start of the machine: `busy` of all cores, `own` of the measured processes."""

    at: float
    busy: float
    own: float


class ForeignCpu:
    """Measures the share of all cores that went to processes outside of the measurement.

    Args:
        roots: the process ids whose trees are measured at that moment. The calling process counts as
            measured too, with the children it has already waited for, but without its other children:
            a system that should be idle is foreign while another one is measured.
    """

    def __init__(self, roots: Callable[[], Iterable[int]]) -> None:
        self._roots = roots

    def read(self) -> CpuReading:
        """The counters now, at the resolution of the kernel's clock tick (10 ms)."""
        own = sum(_seconds(process) for root in self._roots() for process in process_tree(root))
        return CpuReading(time.perf_counter(), _busy_seconds(), own + _seconds(psutil.Process()))

    def share_since(self, before: CpuReading) -> float:
        """Foreign use since `before` as a share of all cores, 0 to 1; stolen time counts as foreign."""
        now = self.read()
        foreign = (now.busy - before.busy) - (now.own - before.own)
        return max(0.0, foreign / ((now.at - before.at) * (os.cpu_count() or 1)))


def process_tree(root: int) -> list[psutil.Process]:
    """The process `root` and its descendants; empty when it has ended."""
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _seconds(process: psutil.Process) -> float:
    """CPU time of a process and of the children it has waited for, so that an ended child is not lost."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
