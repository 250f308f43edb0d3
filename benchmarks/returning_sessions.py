"""Sessions that come back to a slice whose KV cache holds far fewer of them, also after `kill -9`.

All sessions take turns over one slice: every session has its first turn, then every one its second, and so
on, so that each has lost its slot when it returns. The log says how many prompt tokens were reused
(RUN_FINISHED usage: inputTokens, cachedInputTokens). After the first turn only what is new may be computed:
the question, the markers around it, and the token that was sampled last. Then the server is killed, started
again on its data folder, and every session has one more turn under the same rule.

Exit status 1 when old history was computed again.

    .venv/bin/python -m benchmarks.returning_sessions
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.conversation import Answer, SystemFailedError
from benchmarks.harness.cpu import ForeignCpu
from benchmarks.harness.rounds import OPENINGS
from benchmarks.harness.server import AshConversation, AshServer
from benchmarks.harness.stats import percentile
from benchmarks.harness.table import markdown, number

NOT_YET_CACHED = 1
"""Tokens of the former answer that its turn left uncached: the one sampled last was never decoded."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one session.

    Attributes:
        session: its number.
        turn: 1 for its first turn.
        restarted: whether the server was killed before.
        prompt: tokens of the whole prompt.
        reused: those that came out of the cache.
        history: tokens of the former turn's prompt and answer; 0 in the first turn.
        output: tokens of the answer.
        first_token_s: from the request to the first text; None when there was no text.
        failure: why there is no whole answer.
    """

    session: int
    turn: int
    restarted: bool
    prompt: int
    reused: int
    history: int
    output: int
    first_token_s: float | None
    failure: str | None

    @property
    def prefilled(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt - self.reused

    @property
    def recomputed(self) -> int:
        """History that was computed again although the cache should have had it."""
        if self.failure is not None:
            return 0
        return max(0, self.history - NOT_YET_CACHED - self.reused)


class Patrons:
    """The sessions and what they know of their former turns."""

    def __init__(self, server: AshServer, *, together: int) -> None:
        self._server = server
        self._together = asyncio.Semaphore(together)
        self._ids: list[str] = []
        self._history: dict[int, int] = {}

    async def arrive(self, count: int) -> None:
        """Create the sessions."""
        for _ in range(count):
            conversation = await AshConversation.begin(self._server, slice="nano")
            self._ids.append(conversation.session_id)
            await conversation.close()

    async def turn(self, number_: int, *, restarted: bool) -> list[Turn]:
        """Every session asks once; some at the same time, each on a new connection."""
        return list(
            await asyncio.gather(
                *(self._one(session, number_, restarted=restarted) for session in range(len(self._ids)))
            )
        )

    async def _one(self, session: int, turn: int, *, restarted: bool) -> Turn:
        question = OPENINGS[(turn - 1) % len(OPENINGS)].format(number=session, year=1800 + session)
        async with self._together:
            conversation = await AshConversation.resume(self._server, self._ids[session])
            try:
                answer = await conversation.ask(question)
            finally:
                await conversation.close()
        return self._record(session, turn, answer, restarted=restarted)

    def _record(self, session: int, turn: int, answer: Answer, *, restarted: bool) -> Turn:
        prompt = answer.prompt_tokens or 0
        result = Turn(
            session,
            turn,
            restarted,
            prompt,
            answer.cached_tokens or 0,
            self._history.get(session, 0),
            answer.tokens,
            answer.first_token_s,
            answer.failure,
        )
        if answer.failure is None:
            self._history[session] = prompt + answer.tokens
        return result


def table(turns: Sequence[Turn]) -> str:
    """One row for each turn; `recomputed` should be 0 throughout."""
    headers = [
        "turn",
        "sessions",
        "prompt p50",
        "reused p50",
        "prefilled p50",
        "prefilled max",
        "sessions with recomputed history",
        "first token p50 ms",
        "p95 ms",
        "failed",
    ]
    rows = []
    for key in dict.fromkeys((turn.turn, turn.restarted) for turn in turns):
        mine = [turn for turn in turns if (turn.turn, turn.restarted) == key]
        whole = [turn for turn in mine if turn.failure is None]
        waits = [turn.first_token_s for turn in whole if turn.first_token_s is not None]
        rows.append(
            [
                f"{key[0]}, after kill -9" if key[1] else str(key[0]),
                str(len(mine)),
                number(percentile((turn.prompt for turn in whole), 50)),
                number(percentile((turn.reused for turn in whole), 50)),
                number(percentile((turn.prefilled for turn in whole), 50)),
                number(max((turn.prefilled for turn in whole), default=None)),
                str(sum(turn.recomputed > 0 for turn in whole)),
                number(percentile(waits, 50), scale=1000),
                number(percentile(waits, 95), scale=1000),
                str(len(mine) - len(whole)),
            ]
        )
    return markdown(headers, rows)


async def run(arguments: argparse.Namespace) -> list[Turn]:
    turns: list[Turn] = []
    overrides = {
        "ASH_SLICES__NANO__SLOTS": str(arguments.slots),
        "ASH_SLICES__NANO__CONTEXT": str(arguments.context),
        "ASH_SLICES__NANO__SAMPLING__MAX_TOKENS": str(arguments.tokens),
        "ASH_SLICES__NANO__SAMPLING__TEMPERATURE": "0.0",
    }
    with tempfile.TemporaryDirectory(prefix="ash-returning-") as name:
        server = AshServer(Path(name) / "data", overrides)
        await server.start()
        try:
            patrons = Patrons(server, together=arguments.together)
            await patrons.arrive(arguments.sessions)
            cpu = ForeignCpu(server.process_ids)
            for number_ in range(1, arguments.turns + 2):
                restarted = number_ > arguments.turns
                if restarted:
                    await server.kill()
                    await server.start()
                before, began = cpu.read(), time.monotonic()
                turns += await patrons.turn(number_, restarted=restarted)
                print(
                    f"turn {number_}: {time.monotonic() - began:.0f} s, "
                    f"foreign CPU {cpu.share_since(before):.0%}",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            await server.stop()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([dataclasses.asdict(turn) for turn in turns], indent=1))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16, help="sessions that the KV cache holds")
    parser.add_argument("--turns", type=int, default=3, help="before the kill")
    parser.add_argument("--together", type=int, default=4, help="sessions that ask at the same time")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a session")
    parser.add_argument("--json", type=Path, help="write every turn here")
    try:
        turns = asyncio.run(run(parser.parse_args()))
    except SystemFailedError as error:
        sys.exit(f"returning_sessions: {error}")
    print(table(turns))
    recomputed = [turn for turn in turns if turn.recomputed > 0]
    failed = [turn for turn in turns if turn.failure is not None]
    if recomputed or failed:
        total = sum(turn.recomputed for turn in recomputed)
        first = f"; the first failure: {failed[0].failure}" if failed else ""
        sys.exit(
            f"returning_sessions: {len(recomputed)} turns computed {total} tokens of old history again, "
            f"{len(failed)} failed{first}"
        )
    print("no history was computed again")


if __name__ == "__main__":
    main()
