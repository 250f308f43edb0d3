"""Thousands of idle attached sockets: memory of each, and the event loop's lag while sessions stream.

Memory is the growth of the server process's unique set size (USS), divided by the sockets; the same is
measured on a bare `websockets` server with the gateway's settings, and the difference is what Ash adds. The
lag is how late the server's event loop runs a callback that is due, from its own histogram
(`ash_event_loop_lag_seconds` of /metrics): at rest and while sessions stream, without and with the sockets.

    .venv/bin/python -m benchmarks.idle_sockets [--sockets 5000]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection

from benchmarks.harness.conversation import SystemFailedError
from benchmarks.harness.cpu import ForeignCpu
from benchmarks.harness.idle_clients import IdleClients, allow_open_files, call
from benchmarks.harness.memory import unique_bytes
from benchmarks.harness.rounds import OPENINGS
from benchmarks.harness.server import ROOT, AshConversation, AshServer
from benchmarks.harness.stats import histogram_quantile
from benchmarks.harness.table import markdown, number

SETTLE_S = 3.0
"""Between the last handshake and the reading: the garbage of handshakes is freed, queues run empty."""
SESSIONS = 50
"""Idle sessions that the sockets share: what a session itself costs is not a matter of sockets."""
LAG_METRIC = "ash_event_loop_lag_seconds"


@dataclass(frozen=True, slots=True)
class Memory:
    """Kilobytes (1000 bytes) that one socket adds to its server."""

    compression: bool
    bare_kb: float
    ash_kb: float


@dataclass(frozen=True, slots=True)
class Lag:
    """The event loop's lag in one situation, in seconds."""

    situation: str
    samples: int
    p50_s: float | None
    p99_s: float | None
    foreign_cpu: float


async def echo_kb(sockets: int, *, compression: bool) -> float:
    """Kilobytes of one socket of the bare server."""
    command = [sys.executable, "-m", "benchmarks.harness.echo_server"]
    command += ["--compression"] if compression else []
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None, "it was asked for"
    assert process.stdin is not None, "it was asked for"
    port = (await process.stdout.readline()).decode().strip()
    if not port:
        raise SystemFailedError("the bare websockets server did not start; its messages are above")

    async def greeting(socket: ClientConnection, number_: int) -> None:
        await socket.send(json.dumps({"number": number_}))
        await socket.recv()

    clients = IdleClients(f"ws://127.0.0.1:{port}/", greeting, compression=compression)
    try:
        grown = await _growth(process.pid, clients, sockets)
        await clients.close()
    finally:
        process.stdin.close()
        await process.wait()
    return grown


async def _growth(pid: int, clients: IdleClients, sockets: int) -> float:
    """Open the sockets; kilobytes by which the process grew for each.

    Raises:
        SystemFailedError: the server closed some of them.
    """
    before = unique_bytes(pid)
    await clients.open(sockets)
    # Nothing tells when memory has settled.
    await asyncio.sleep(SETTLE_S)
    if clients.still_open != sockets:
        raise SystemFailedError(f"only {clients.still_open} of {sockets} sockets are still open")
    return (unique_bytes(pid) - before) / sockets / 1000


class Gateway:
    """A server of Ash, its idle sockets, and sessions that stream."""

    def __init__(self, server: AshServer, *, streams: int, rest_s: float) -> None:
        self.server = server
        self._streams = streams
        self._rest_s = rest_s
        self._cpu = ForeignCpu(server.process_ids)

    async def idle_clients(self, *, compression: bool) -> IdleClients:
        """Clients that initialise and attach to one of some idle sessions."""
        sessions = []
        for _ in range(SESSIONS):
            conversation = await AshConversation.begin(self.server, slice="nano")
            sessions.append(conversation.session_id)
            await conversation.close()
        token = self.server.token

        async def greeting(socket: ClientConnection, number_: int) -> None:
            await call(socket, 1, "initialize", {"protocolVersion": 1, "token": token})
            session = sessions[number_ % len(sessions)]
            await call(socket, 2, "session/attach", {"sessionId": session, "afterSeq": 0})

        return IdleClients(self.server.ws, greeting, compression=compression, subprotocols=["ash.v1"])

    async def at_rest(self, situation: str) -> Lag:
        """The lag while nothing runs."""
        before, cpu = await self._lag_counts(), self._cpu.read()
        # The time over which is measured.
        await asyncio.sleep(self._rest_s)
        return await self._lag_since(before, situation, self._cpu.share_since(cpu))

    async def streaming(self, situation: str) -> Lag:
        """The lag while all streams answer one question."""
        conversations = await self.server.converse(self._streams)
        before, cpu = await self._lag_counts(), self._cpu.read()
        questions = [OPENINGS[0].format(number=each, year=1850) for each in range(self._streams)]
        answers = await asyncio.gather(
            *(each.ask(question) for each, question in zip(conversations, questions, strict=True))
        )
        lag = await self._lag_since(before, situation, self._cpu.share_since(cpu))
        await asyncio.gather(*(conversation.close() for conversation in conversations))
        if failures := [answer.failure for answer in answers if answer.failure is not None]:
            raise SystemFailedError(f"a stream failed: {failures[0]}")
        return lag

    async def _lag_counts(self) -> dict[float, float]:
        """Observations at or below each upper bound, so far."""
        counts = {}
        for family in text_string_to_metric_families(await self.server.metrics()):
            for sample in family.samples:
                if sample.name == f"{LAG_METRIC}_bucket":
                    counts[float(sample.labels["le"])] = float(sample.value)
        return counts

    async def _lag_since(self, before: dict[float, float], situation: str, foreign: float) -> Lag:
        now = await self._lag_counts()
        counts = {bound: now[bound] - before[bound] for bound in now}
        return Lag(
            situation,
            int(max(counts.values(), default=0)),
            histogram_quantile(0.5, counts),
            histogram_quantile(0.99, counts),
            foreign,
        )


async def measure(arguments: argparse.Namespace) -> tuple[list[Memory], list[Lag]]:
    memory, lags = [], []
    for compression in (False, True):
        bare = await echo_kb(arguments.sockets, compression=compression)
        with tempfile.TemporaryDirectory(prefix="ash-idle-") as name:
            overrides = {
                "ASH_GATEWAY__MAX_CONNECTIONS": str(arguments.sockets + arguments.streams + SESSIONS),
                "ASH_GATEWAY__COMPRESSION": str(compression).lower(),
                "ASH_SLICES__NANO__SLOTS": str(arguments.streams),
                "ASH_SLICES__NANO__SAMPLING__MAX_TOKENS": str(arguments.tokens),
            }
            server = AshServer(Path(name) / "data", overrides)
            await server.start()
            try:
                gateway = Gateway(server, streams=arguments.streams, rest_s=arguments.rest)
                clients = await gateway.idle_clients(compression=compression)
                # The slice is loaded, and every code path was taken, before memory is read.
                await gateway.streaming("warm-up")
                if not compression:
                    lags.append(await gateway.streaming("streaming, no idle sockets"))
                ours = await _growth(server.pid, clients, arguments.sockets)
                memory.append(Memory(compression, bare, ours))
                if not compression:
                    lags.append(await gateway.at_rest(f"at rest, {arguments.sockets} idle sockets"))
                    lags.append(await gateway.streaming(f"streaming, {arguments.sockets} idle sockets"))
                if clients.still_open != arguments.sockets:
                    raise SystemFailedError(f"only {clients.still_open} sockets are open at the end")
                await clients.close()
            finally:
                await server.stop()
    return memory, lags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sockets", type=int, default=5000)
    parser.add_argument("--streams", type=int, default=8, help="sessions that answer under load")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rest", type=float, default=20.0, help="seconds of the measurement at rest")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    try:
        allow_open_files(arguments.sockets + arguments.streams + SESSIONS)
        memory, lags = asyncio.run(measure(arguments))
    except SystemFailedError as error:
        sys.exit(f"idle_sockets: {error}")
    print(
        markdown(
            [f"kB of each of {arguments.sockets} sockets", "websockets alone", "Ash", "beyond the library"],
            [
                [
                    "with compression" if row.compression else "without compression",
                    number(row.bare_kb, 1),
                    number(row.ash_kb, 1),
                    number(row.ash_kb - row.bare_kb, 1),
                ]
                for row in memory
            ],
        )
    )
    print()
    print(
        markdown(
            ["event loop of the server", "samples", "lag p50 ms", "lag p99 ms", "foreign CPU"],
            [
                [
                    row.situation,
                    str(row.samples),
                    number(row.p50_s, 1, 1000),
                    number(row.p99_s, 1, 1000),
                    number(row.foreign_cpu, 0, 100) + "%",
                ]
                for row in lags
            ],
        )
    )
    if arguments.json is not None:
        results = {
            "memory": [dataclasses.asdict(row) for row in memory],
            "lag": [dataclasses.asdict(row) for row in lags],
        }
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
