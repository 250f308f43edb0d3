"""Continuous batching: the loop of the one thread that owns the llama.cpp context.

Each step takes in what came from the server, gives slots to waiting generations, decodes one batch and sends
one frame of results. Nothing here blocks on the server; when no generation can go on, the loop sleeps on its
inbox.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Literal

from ash.domain.errors import FormatError
from ash.slices.worker.arrangement import next_move
from ash.slices.worker.generation import Generation
from ash.slices.worker.inference import BatchEntry, Inference, Vocabulary
from ash.slices.worker.messages import (
    Begun,
    Ended,
    EndReason,
    Progress,
    Refused,
    Step,
    Update,
    WorkerStatistics,
)
from ash.slices.worker.pace import Pace
from ash.slices.worker.schedule import Decoding, Prefill, plan_step
from ash.slices.worker.slots import SlotTable
from ash.slices.worker.tokenising import tokenised

_NO_KV_ROOM = 1  # llama_decode: could not find a KV slot for the batch

Command = Callable[[], None]
_Served = tuple[Generation, BatchEntry]


class Decoder:
    """Runs generations side by side on one model.

    `submit`, `cancel`, `acknowledge`, `forget`, `wake`, `stop` and `statistics` may be called from any
    thread; `run` is the loop of the thread that owns `inference`.

    Args:
        inference: the model and its KV cache.
        vocabulary: its tokens.
        slots: who has which sequence of the KV cache.
        slot_count: how many there are.
        context: the most tokens of a sequence.
        batch: the most tokens of a step.
        pace: how many prompt tokens a step may hold.
        send: takes the results of each step.
    """

    def __init__(
        self,
        inference: Inference,
        vocabulary: Vocabulary,
        slots: SlotTable,
        *,
        slot_count: int,
        context: int,
        batch: int,
        pace: Pace,
        send: Callable[[Step], None],
    ) -> None:
        self._inference = inference
        self._vocabulary = vocabulary
        self._slots = slots
        self._slot_count = slot_count
        self._context = context
        self._batch = batch
        self._pace = pace
        self._send = send
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._running = True
        self._waiting: deque[Generation] = deque()
        self._active: dict[int, Generation] = {}
        self._updates: list[Update] = []
        # After a preemption nobody is admitted until somebody leaves, or the same would happen again.
        self._cache_is_full = False
        self._arrivals = 0
        self._steps = 0
        self._step_began: float | None = None
        # When those that stream got their last tokens.
        self._decoded_at = 0.0
        self._busy_s = 0.0
        self._prefilled_tokens = 0
        self._decoded_tokens = 0
        self._preempted = 0

    def submit(self, generation: Generation) -> None:
        """Take a new generation."""
        self._inbox.put(lambda: self._enqueue(generation))

    def cancel(self, id: int) -> None:  # noqa: A002 - the protocol's word for it
        """End a generation within one step; unknown ids have ended already."""
        self._inbox.put(lambda: self._cancel(id))

    def acknowledge(self, id: int, tokens: int) -> None:  # noqa: A002 - the protocol's word for it
        """The consumer has taken `tokens` tokens."""
        self._inbox.put(lambda: self._acknowledge(id, tokens))

    def forget(self, session: str) -> None:
        """Remove every trace of a session that was deleted."""
        self._inbox.put(lambda: self._slots.forget(session))

    def wake(self) -> None:
        """Look again whether there is something to do."""
        self._inbox.put(lambda: None)

    def stop(self) -> None:
        """Leave `run` after the current step."""
        self._inbox.put(self._stop)

    def statistics(self) -> WorkerStatistics:
        """Counters at this moment."""
        began = self._step_began
        return WorkerStatistics(
            steps=self._steps,
            step_age_s=0.0 if began is None else time.monotonic() - began,
            busy_s=self._busy_s,
            prefilled_tokens=self._prefilled_tokens,
            decoded_tokens=self._decoded_tokens,
            active=len(self._active),
            waiting=len(self._waiting),
            resident_sessions=self._slots.resident_sessions,
            unsaved_sessions=self._slots.unsaved_sessions,
            preempted=self._preempted,
        )

    def save_all(self) -> None:
        """Save what has changed of every session; after `run` has returned."""
        for generation in list(self._active.values()):
            self._leave(generation)
        while self._slots.save_one_idle(wait=True):
            pass

    def run(self) -> None:
        """Work until `stop`."""
        idle = False
        while self._running:
            self._take_commands(wait=idle)
            self._admit()
            served = self._plan()
            if served:
                self._step(served)
            # One a step: a few milliseconds, so that a killed process costs nobody their history.
            saved = self._slots.save_one_idle()
            idle = not served and not saved
            if self._updates:
                updates, self._updates = self._updates, []
                self._send(Step(updates))

    def _take_commands(self, *, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except Empty:
                return
            command()

    def _enqueue(self, generation: Generation) -> None:
        generation.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(generation)

    def _cancel(self, id: int) -> None:  # noqa: A002 - the protocol's word for it
        generation = self._active.get(id)
        if generation is not None:
            self._end(generation, "cancelled")
            return
        for waiting in self._waiting:
            if waiting.id == id:
                self._waiting.remove(waiting)
                self._end(waiting, "cancelled")
                return

    def _acknowledge(self, id: int, tokens: int) -> None:  # noqa: A002 - the protocol's word for it
        generation = self._active.get(id)
        if generation is None:
            # A preempted generation waits, but its consumer still reads what was sent before.
            generation = next((waiting for waiting in self._waiting if waiting.id == id), None)
        if generation is not None:
            generation.unacknowledged_tokens -= tokens

    def _stop(self) -> None:
        self._running = False

    def _admit(self) -> None:
        """Give slots in the order of arrival; a session that is busy lets others pass."""
        if not self._active:
            self._cache_is_full = False
        if self._cache_is_full:
            return
        began = time.monotonic()
        for generation in list(self._waiting):
            if self._slots.is_busy(generation.session) or self._awaits_prefix(generation):
                continue
            if self._active and time.monotonic() - began > self._pace.stall_s / 4:
                # Putting states out and in takes time, too, and there are some that stream meanwhile.
                return
            resident = self._slots.claim(generation.session, generation.sequence)
            if resident is None:
                return
            self._waiting.remove(generation)
            generation.resident = resident
            self._active[generation.id] = generation
            generation.served_step = self._steps
            if generation.sampler is None:
                self._begin(generation)

    def _awaits_prefix(self, generation: Generation) -> bool:
        """True while somebody else computes the system prompt that this new session begins with."""
        shared = generation.prompt.shared
        return (
            bool(shared)
            and not self._slots.holds(generation.session)
            and any(other.computes_prefix == shared for other in self._active.values())
        )

    def _begin(self, generation: Generation) -> None:
        reused = self._slots.load(
            generation.held, generation.prompt.text, lambda text: tokenised(self._vocabulary, text)
        )
        shared = generation.prompt.shared
        if reused < len(shared) and not self._slots.has_prefix(shared):
            generation.computes_prefix = shared
        sampling = generation.sampling
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        generation.sampler = self._inference.new_sampler(sampling, seed=seed)
        for token in generation.prompt.continuation_tokens:
            generation.sampler.accept(token)
        generation.admitted_at = time.monotonic()
        generation.arrived_step = self._steps
        self._updates.append(
            Begun(
                generation.id,
                prompt_tokens=len(generation.held.sequence),
                reused_tokens=reused,
                dropped_messages=generation.prompt.dropped_messages,
            )
        )

    def _plan(self) -> list[_Served]:
        """The generations of the next step and their tokens, by slot so that neighbours lie together."""
        decoding: list[Decoding] = []
        prefills: list[Prefill] = []
        for generation in self._active.values():
            if generation.is_paused:
                continue
            if generation.is_decoding:
                decoding.append(Decoding(generation.id, self._steps - generation.served_step))
            else:
                prefills.append(
                    Prefill(
                        generation.id,
                        remaining=generation.held.sequence.pending,
                        arrival=generation.arrival,
                        waited=self._steps - generation.arrived_step,
                    )
                )
        self._gather(decoding)
        now = time.monotonic()
        if not decoding:
            self._decoded_at = now
        allowance = self._pace.allowance(waited_s=now - self._decoded_at)
        plan = plan_step(decoding, prefills, batch=self._batch, allowance=allowance)
        served = [(self._active[key], 1) for key in plan.decode]
        served += [(self._active[key], tokens) for key, tokens in plan.prefill]
        served.sort(key=lambda entry: entry[0].held.slot)
        return [(generation, _entry(generation, tokens)) for generation, tokens in served]

    def _gather(self, decoding: Sequence[Decoding]) -> None:
        """Bring the sequences that decode together, one move a step so that no step takes long."""
        slots = {self._active[entry.key].held.slot for entry in decoding}
        move = next_move(slots, self._slot_count)
        if move is not None and len(self._active) == len(decoding):
            self._slots.move(*move)

    def _step(self, served: Sequence[_Served]) -> None:
        began = self._step_began = time.monotonic()
        prompts = sum(not generation.is_decoding for generation, _ in served)
        prefilled = sum(len(entry.tokens) for generation, entry in served if not generation.is_decoding)
        code = self._inference.decode([entry for _, entry in served])
        if code == 0:
            decoding = len(served) - prompts
            self._advance_all(served)
            now = time.monotonic()
            self._pace.observe(decoding=decoding, prefilled=prefilled, seconds=now - began)
            if decoding:
                self._decoded_at = now
        else:
            for generation, _ in served:
                self._slots.cut(generation.held)
            if code == _NO_KV_ROOM:
                self._make_room()
            else:
                self._step_one_by_one(served, code)
        self._busy_s += time.monotonic() - began
        self._step_began = None
        self._steps += 1

    def _step_one_by_one(self, served: Sequence[_Served], code: int) -> None:
        """After a failed batch, find out whose tokens failed: the others go on."""
        for generation, entry in served:
            alone = _entry(generation, len(entry.tokens))
            failure = self._inference.decode([alone]) if len(served) > 1 else code
            if failure == 0:
                self._advance_all([(generation, alone)])
            else:
                self._slots.cut(generation.held)
                self._refuse(generation, f"llama_decode failed with code {failure} on this session's tokens")

    def _advance_all(self, served: Sequence[_Served]) -> None:
        index = -1
        for generation, entry in served:
            index += len(entry.tokens)
            try:
                self._advance(generation, entry, index)
            except FormatError as error:
                self._refuse(generation, str(error), kind="format")

    def _advance(self, generation: Generation, entry: BatchEntry, index: int) -> None:
        """Count what was computed, and draw the next token where the step gave logits."""
        generation.held.sequence.cached += len(entry.tokens)
        generation.served_step = self._steps
        if generation.first_token_at is None:
            self._prefilled_tokens += len(entry.tokens)
        sequence = generation.held.sequence
        if generation.computes_prefix and sequence.cached == len(generation.computes_prefix):
            self._slots.save_prefix(generation.held, generation.computes_prefix)
            generation.computes_prefix = ()
        if not entry.wants_logits:
            return
        assert generation.sampler is not None
        if generation.first_token_at is None:
            generation.first_token_at = time.monotonic()
        token = self._inference.sample(generation.sampler, index, generation.constraint)
        if generation.constraint is not None and not self._vocabulary.is_end(token):
            generation.constraint.accept(token)
        self._take_token(generation, token)

    def _take_token(self, generation: Generation, token: int) -> None:
        sequence = generation.held.sequence
        sequence.append(token, self._vocabulary.piece(token))
        self._decoded_tokens += 1
        if self._vocabulary.is_end(token):
            self._end(generation, "stop")
            return
        generation.output_tokens += 1
        generation.unsent_tokens += 1
        shown = generation.output.feed(self._vocabulary.shown_piece(token))
        self._show(generation, shown.text)
        if shown.stopped:
            self._end(generation, "stop", flush=False)
        elif generation.constraint is not None and generation.constraint.is_complete:
            self._end(generation, "stop")
        elif generation.output_tokens >= generation.prompt.max_output or len(sequence) >= self._context:
            self._end(generation, "length")

    def _show(self, generation: Generation, text: str) -> None:
        if text:
            self._updates.append(Progress(generation.id, text, generation.unsent_tokens))
            generation.unacknowledged_tokens += generation.unsent_tokens
            generation.unsent_tokens = 0

    def _end(self, generation: Generation, reason: EndReason, *, flush: bool = True) -> None:
        if flush and reason != "cancelled":
            self._show(generation, generation.output.finish())
        now = time.monotonic()
        first = generation.first_token_at
        began = generation.admitted_at or now
        self._updates.append(
            Ended(
                generation.id,
                reason=reason,
                output_tokens=generation.output_tokens,
                prefill_s=(first or now) - began,
                decode_s=0.0 if first is None else now - first,
            )
        )
        self._leave(generation)

    def _refuse(
        self, generation: Generation, message: str, *, kind: Literal["failed", "format"] = "failed"
    ) -> None:
        self._updates.append(Refused(generation.id, kind, message))
        self._leave(generation)

    def _leave(self, generation: Generation) -> None:
        if generation.sampler is not None:
            generation.sampler.close()
        if generation.resident is not None:
            self._slots.release(generation.resident)
            generation.resident = None
        self._active.pop(generation.id, None)
        self._cache_is_full = False

    def _make_room(self) -> None:
        """The KV cache is full: page out an idle session, or else the generation that came last."""
        if self._slots.page_out_idle():
            return
        newest = max(self._active.values(), key=lambda generation: generation.arrival)
        if len(self._active) == 1:
            self._refuse(newest, "the KV cache has no room for this generation although it is alone")
            return
        resident = newest.held
        newest.sequence, newest.resident = resident.sequence, None
        self._slots.page_out(resident)
        del self._active[newest.id]
        self._waiting.appendleft(newest)
        self._cache_is_full = True
        self._preempted += 1


def _entry(generation: Generation, tokens: int) -> BatchEntry:
    sequence = generation.held.sequence
    start = sequence.cached
    if start < len(generation.computes_prefix):
        # Stop where the common beginning ends: its state is saved there.
        tokens = min(tokens, len(generation.computes_prefix) - start)
    return BatchEntry(
        slot=generation.held.slot,
        position=start,
        tokens=tuple(sequence.tokens[start : start + tokens]),
        wants_logits=tokens == sequence.pending,
    )
