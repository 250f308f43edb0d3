"""Rounds of a growing conversation that all sessions start together, and the measures of a round."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.harness.conversation import Answer, System
from benchmarks.harness.cpu import ForeignCpu

OPENINGS = (
    "Tell me a long story about the lighthouse keeper number {number} and the storm of the year {year}.",
    "What did the keeper do on the next morning? Tell it in every detail.",
    "Who came to visit him years later, and what did they talk about?",
    "How does his story end? Take your time and describe the place as well.",
)
"""Questions that a small model answers at length, so that no answer ends before its tokens are used up."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one system: what was measured.

    Attributes:
        repetition: which pass over all systems.
        system: whose round it is.
        sessions: how many asked at the same time.
        number: 1 for the first question of the conversation.
        tokens: output tokens of all answers.
        window_s: from the first token of any answer to the last token of any.
        wall_s: from the first request to the last token of any.
        steady_tokens: tokens while every session was decoding and none was prefilling.
        steady_s: how long that was; 0 when there was no such time.
        first_token_s: for each session, from its request to its first token.
        gaps_s: between the pieces of an answer, of all answers.
        prompt_tokens: mean length of the prompts; 0 where the system does not say.
        cached_tokens: mean number of those that were not computed again.
        foreign_cpu: share of all cores that other processes used.
        failures: why answers are missing.
    """

    repetition: int
    system: str
    sessions: int
    number: int
    tokens: int = 0
    window_s: float = 0.0
    wall_s: float = 0.0
    steady_tokens: float = 0.0
    steady_s: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    foreign_cpu: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def window_tokens_per_s(self) -> float | None:
        """Decode throughput: all tokens by the time from the first to the last one, over all sessions."""
        return self.tokens / self.window_s if self.window_s > 0 else None

    @property
    def steady_tokens_per_s(self) -> float | None:
        """Throughput while every session was decoding: what llama-batched-bench measures."""
        return self.steady_tokens / self.steady_s if self.steady_s > 0 else None

    @property
    def wall_tokens_per_s(self) -> float | None:
        """All tokens by the time from the requests to the last token, prefill included."""
        return self.tokens / self.wall_s if self.wall_s > 0 else None


def measure(
    answers: Sequence[Answer], *, repetition: int, system: str, number: int, foreign_cpu: float
) -> Round:
    """The measures of one round; a failed answer leaves only its reason."""
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if failures or not all(answer.pieces for answer in answers):
        return Round(
            repetition,
            system,
            len(answers),
            number,
            foreign_cpu=foreign_cpu,
            failures=failures or ["an answer without text"],
        )
    firsts = [answer.pieces[0].at for answer in answers]
    lasts = [answer.pieces[-1].at for answer in answers]
    steady_from, steady_to = max(firsts), min(lasts)
    steady_s = max(0.0, steady_to - steady_from)
    steady = sum(answer.tokens_between(steady_from, steady_to) for answer in answers)
    return Round(
        repetition,
        system,
        len(answers),
        number,
        tokens=sum(answer.tokens for answer in answers),
        window_s=max(lasts) - min(firsts),
        wall_s=max(lasts) - min(answer.asked_at for answer in answers),
        steady_tokens=steady if steady_s > 0 else 0.0,
        steady_s=steady_s,
        first_token_s=[answer.pieces[0].at - answer.asked_at for answer in answers],
        gaps_s=[gap for answer in answers for gap in answer.gaps_s],
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in answers) / len(answers),
        cached_tokens=sum(answer.cached_tokens or 0 for answer in answers) / len(answers),
        foreign_cpu=foreign_cpu,
    )


async def converse(system: System, *, sessions: int, rounds: int, repetition: int) -> list[Round]:
    """New conversations of `sessions` clients; a round starts when the last answer of the former is there.

    The questions depend on repetition and session alone, so every system gets the same ones, and none of
    them finds an earlier repetition in its caches.
    """
    conversations = await system.converse(sessions)
    cpu = ForeignCpu(system.process_ids)
    results = []
    try:
        for number in range(1, rounds + 1):
            questions = [
                OPENINGS[(number - 1) % len(OPENINGS)].format(number=session, year=1800 + repetition)
                for session in range(sessions)
            ]
            before = cpu.read()
            answers = await asyncio.gather(
                *(
                    conversation.ask(question)
                    for conversation, question in zip(conversations, questions, strict=True)
                )
            )
            results.append(
                measure(
                    answers,
                    repetition=repetition,
                    system=system.name,
                    number=number,
                    foreign_cpu=cpu.share_since(before),
                )
            )
            if results[-1].failures:
                break
    finally:
        await asyncio.gather(*(conversation.close() for conversation in conversations))
    return results
