"""llama.cpp's own programs and llama-cpp-python's packaged server as peers of Ash.

Where they come from: `python -m benchmarks.build_peers`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness.conversation import SystemFailedError
from benchmarks.harness.openai_chat import OpenAiConversation

START_LIMIT_S = 120.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PeerPrograms:
    """Where the peers are, below the folder that build_peers.py was given."""

    folder: Path

    @property
    def llama_server(self) -> Path:
        """llama.cpp's HTTP server."""
        return self.folder / "build" / "bin" / "llama-server"

    @property
    def batched_bench(self) -> Path:
        """llama.cpp's benchmark of parallel decoding."""
        return self.folder / "build" / "bin" / "llama-batched-bench"

    @property
    def python(self) -> Path:
        """The interpreter that can run `llama_cpp.server`."""
        return self.folder / "venv" / "bin" / "python"

    def missing(self) -> list[Path]:
        """Those that are not there yet."""
        return [path for path in (self.llama_server, self.batched_bench, self.python) if not path.exists()]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every system is given alike.

    Attributes:
        model: the GGUF file.
        persona: the system message.
        tokens: the most that an answer may have.
        context: tokens that each session has room for.
        threads: decoding threads.
        sessions: the most sessions at the same time.
    """

    model: Path
    persona: str
    tokens: int
    context: int
    threads: int
    sessions: int


class HttpPeer:
    """A peer with an OpenAI-compatible server, as a child process.

    Args:
        name: for tables.
        command: program and arguments without model, address and port.
        health: the path that answers 200 when it is ready.
        request: further fields of every chat request.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        health: str,
        workload: Workload,
        request: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._health = health
        self._workload = workload
        self._request = {**request, "max_tokens": workload.tokens, "temperature": 0.0}
        self._folder = folder / name.replace(" ", "-")
        self._process: asyncio.subprocess.Process | None = None
        self._base = ""

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            SystemFailedError: it does not; the message holds the end of what it printed.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # A copy of its own: pages of one file would be divided among all who map it, and every system
        # would seem smaller than it is alone.
        model = self._folder / self._workload.model.name
        await asyncio.to_thread(shutil.copyfile, self._workload.model, model)
        port = _free_port()
        self._base = f"http://127.0.0.1:{port}"
        command = [*self._command, "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        log = self._folder / "output.txt"
        with log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
        try:
            async with asyncio.timeout(START_LIMIT_S), aiohttp.ClientSession() as session:
                while not await _answers(session, self._base + self._health):
                    if self._process.returncode is not None:
                        raise SystemFailedError(f"{self.name} ended at its start:\n{_tail(log)}")
                    # It has no other sign of being ready than its answer.
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise SystemFailedError(
                f"{self.name} was not ready after {START_LIMIT_S:g} s:\n{_tail(log)}"
            ) from error

    async def stop(self) -> None:
        """End it; harmless when it has ended."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()

    def process_ids(self) -> list[int]:
        """The root of its process tree."""
        running = self._process is not None and self._process.returncode is None
        return [self._process.pid] if running and self._process is not None else []

    async def converse(self, count: int) -> Sequence[OpenAiConversation]:
        """As many new conversations, each on a connection of its own."""
        return [OpenAiConversation(self._base, self._workload.persona, self._request) for _ in range(count)]


def llama_server(
    name: str,
    programs: PeerPrograms,
    workload: Workload,
    folder: Path,
    *,
    slots: int | None,
    options: Sequence[str],
) -> HttpPeer:
    """llama-server with `options` and a context of `workload.context` tokens for each slot.

    Args:
        slots: for `-np`; None leaves it to llama-server, which takes four.
    """
    command = [str(programs.llama_server), "--threads", str(workload.threads), "--no-ui"]
    command += ["-c", str(workload.context * (slots or 4))]
    command += ["-np", str(slots)] if slots is not None else []
    # Only the end of the text could end an answer early, so every system is measured over equal lengths.
    return HttpPeer(
        name,
        [*command, *options],
        health="/health",
        workload=workload,
        request={"ignore_eos": True},
        folder=folder,
    )


def llama_cpp_python(programs: PeerPrograms, workload: Workload, folder: Path) -> HttpPeer:
    """llama-cpp-python's packaged server: one request at a time.

    By default it breaks off an answer when the next request comes; with that no answer would ever be whole,
    so it is the one default that is changed.
    """
    command = [str(programs.python), "-m", "llama_cpp.server", "--interrupt_requests", "false"]
    command += ["--n_threads", str(workload.threads), "--n_threads_batch", str(workload.threads)]
    command += ["--n_ctx", str(workload.context), "--verbose", "false"]
    return HttpPeer(
        "llama-cpp-python", command, health="/v1/models", workload=workload, request={}, folder=folder
    )


@dataclass(frozen=True, slots=True)
class BatchedDecode:
    """One row of llama-batched-bench: `sequences` x `tokens` decoded in `seconds` behind `prompt` tokens."""

    prompt: int
    tokens: int
    sequences: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput of all sequences together."""
        return self.tokens * self.sequences / self.seconds


async def batched_bench(
    programs: PeerPrograms,
    workload: Workload,
    *,
    prompts: Sequence[int],
    sequences: int,
    options: Sequence[str],
) -> list[BatchedDecode]:
    """Run llama-batched-bench; one row for each prompt length.

    With separate KV streams the prompt is computed once and copied (`-pps`) before the clock starts; each
    sequence still decodes over cells of its own. In a unified buffer shared cells would be read once for all
    sequences, which no conversation allows, so there every sequence computes its own.

    Raises:
        SystemFailedError: it failed, or printed no results.
    """
    command = [str(programs.batched_bench), "-m", str(workload.model), "-t", str(workload.threads)]
    command += ["-c", str(workload.context * sequences), "-npl", str(sequences), "-ntg", str(workload.tokens)]
    command += ["-npp", ",".join(str(length) for length in prompts), "--output-format", "jsonl", *options]
    command += ["-pps"] if "-no-kvu" in options else []
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode(errors="replace")
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if process.returncode != 0 or len(rows) != len(prompts):
        raise SystemFailedError(f"llama-batched-bench failed ({process.returncode}):\n{output[-2000:]}")
    return [BatchedDecode(row["pp"], row["tg"], row["pl"], row["t_tg"]) for row in rows]


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:])
