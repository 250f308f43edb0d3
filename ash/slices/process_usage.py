"""What a process takes of the machine, as Linux tells it in /proc (proc(5)). Parsing is pure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from msgspec import Struct

_KIB: Final = 1024
"""The kernel writes kB and means KiB."""


class MemoryUse(Struct, frozen=True):
    """Memory of a process, in bytes.

    Attributes:
        anonymous: pages that no file backs: heap, KV cache, repacked weights. They stay until they are freed.
        file_backed: pages of mapped files, model and libraries. The kernel can take them back at any time.
        resident: both together (RSS).
        proportional: the same, with pages that n processes share counted as 1/n (PSS).
        peak: the most that was resident since the process started.
    """

    anonymous: int
    file_backed: int
    resident: int
    proportional: int
    peak: int


class CpuTimes(Struct, frozen=True):
    """Clock ticks since the machine started: all processors, their busy part, the processes of interest."""

    total: int
    busy: int
    own: int

    def others_share(self, later: CpuTimes) -> float:
        """Share of all processors that went to other processes between this reading and `later`, 0 to 1."""
        total = later.total - self.total
        others = (later.busy - self.busy) - (later.own - self.own)
        # The counters are read one after the other, so the difference can fall a tick below nothing.
        return min(1.0, max(0.0, others / total)) if total > 0 else 0.0


def parse_memory(smaps_rollup: str, status: str) -> MemoryUse:
    """Memory from the texts of /proc/PID/smaps_rollup and /proc/PID/status.

    Raises:
        ValueError: a line is missing; the kernel is older than Linux 4.14, or the process has ended.
    """
    resident = _bytes(smaps_rollup, "Rss")
    anonymous = _bytes(smaps_rollup, "Anonymous")
    return MemoryUse(
        anonymous=anonymous,
        file_backed=resident - anonymous,
        resident=resident,
        proportional=_bytes(smaps_rollup, "Pss"),
        # The peak is kept in counters that lag behind the page tables by some pages.
        peak=max(resident, _bytes(status, "VmHWM")),
    )


def parse_cpu_times(stat: str, process_stats: list[str]) -> CpuTimes:
    """Times from the text of /proc/stat and those of /proc/PID/stat of the processes of interest."""
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) for field in stat.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return CpuTimes(total=busy + idle + iowait, busy=busy, own=sum(map(_process_ticks, process_stats)))


def memory_use(pid: int) -> MemoryUse:
    """Memory of the process `pid`.

    Raises:
        OSError: there is no such process, or it belongs to another user.
    """
    folder = Path(f"/proc/{pid}")
    return parse_memory((folder / "smaps_rollup").read_text(), (folder / "status").read_text())


def cpu_times(pid: int) -> CpuTimes:
    """CPU times, with this process and `pid` as the processes of interest.

    Raises:
        OSError: there is no such process.
    """
    texts = [Path(f"/proc/{each}/stat").read_text() for each in (os.getpid(), pid)]
    return parse_cpu_times(Path("/proc/stat").read_text(), texts)


def processor_seconds(pid: int) -> float:
    """Processor time that all threads of the process `pid` took since its start.

    Raises:
        OSError: there is no such process.
    """
    return _process_ticks(Path(f"/proc/{pid}/stat").read_text()) / os.sysconf("SC_CLK_TCK")


def _process_ticks(stat: str) -> int:
    # The name in parentheses may hold spaces; fields 14 and 15 are utime and stime.
    fields = stat[stat.rindex(")") + 1 :].split()
    return int(fields[11]) + int(fields[12])


def _bytes(text: str, key: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * _KIB
    raise ValueError(f"there is no line {key!r} in the memory statistics of the process")
