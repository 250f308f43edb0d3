"""The two threads of a worker: one talks to the server and prepares prompts, one decodes."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Final, assert_never

from msgspec import structs

from ash.domain.errors import FormatError, ModelFileError, PromptTooLong, SliceUnavailable, TemplateError
from ash.domain.values import GenerateRequest, OutputFormat
from ash.ipc.parent import ParentConnection
from ash.slices.spec import SliceSpec
from ash.slices.worker.constraint import FormatCompiler, FormatConstraint
from ash.slices.worker.decoder import Decoder
from ash.slices.worker.generation import Generation, Prompt
from ash.slices.worker.llama import LlamaContext, LlamaLog, LlamaModel
from ash.slices.worker.messages import (
    Acknowledge,
    Cancel,
    Configure,
    Forget,
    Generate,
    LoadFailed,
    Ping,
    Pong,
    Ready,
    Refused,
    Step,
    ToWorker,
    WorkerStatistics,
)
from ash.slices.worker.pace import Pace
from ash.slices.worker.prompts import PromptBuilder
from ash.slices.worker.slots import SlotTable
from ash.slices.worker.state_files import StateFolder
from ash.slices.worker.states import StateStore
from ash.slices.worker.template import ChatTemplate

_FAREWELL_S: Final = 2.0
"""For the running step to end, and again for what waits for the disk."""


class WorkerService:
    """Serves one model over `parent` until the server closes the channel."""

    def __init__(self, parent: ParentConnection[ToWorker]) -> None:
        self._parent = parent
        self._decoder: Decoder | None = None
        self._prompts: PromptBuilder | None = None
        self._spec: SliceSpec | None = None
        self._states: StateStore | None = None
        self._formats: FormatCompiler | None = None
        self._model: LlamaModel | None = None
        self._decoding: threading.Thread | None = None

    def run(self) -> None:
        """The loop of the thread that talks to the server.

        Raises:
            FrameError: the server does not speak the protocol.
        """
        for message in self._parent.messages():
            match message:
                case Configure():
                    # The model is loaded where it is used, so that pings are answered meanwhile.
                    self._decoding = threading.Thread(
                        target=self._own_model, args=(message,), name="decode", daemon=True
                    )
                    self._decoding.start()
                case Generate():
                    self._submit(message.id, message.request)
                case Cancel():
                    if self._decoder is not None:
                        self._decoder.cancel(message.id)
                case Acknowledge():
                    if self._decoder is not None:
                        self._decoder.acknowledge(message.id, message.tokens)
                case Forget():
                    if self._decoder is not None:
                        self._decoder.forget(message.session)
                case Ping():
                    self._parent.send(Pong(message.number, self._statistics()))
                case _:
                    assert_never(message)
        self._shut_down()

    def _statistics(self) -> WorkerStatistics:
        if self._decoder is None or self._states is None:
            return WorkerStatistics()
        statistics = self._decoder.statistics()
        return structs.replace(
            statistics,
            unsaved_sessions=statistics.unsaved_sessions + self._states.unwritten_sessions,
            ram_sessions=self._states.ram_sessions,
            ram_bytes=self._states.ram_bytes,
            disk_sessions=self._states.disk_sessions,
            disk_bytes=self._states.disk_bytes,
        )

    def _shut_down(self) -> None:
        """Save what the sessions have in the KV cache; the server allows a few seconds for it."""
        if self._decoder is None or self._states is None or self._decoding is None:
            return
        self._decoder.stop()
        self._decoding.join(_FAREWELL_S)
        if not self._decoding.is_alive():
            self._decoder.save_all()
        self._states.close(_FAREWELL_S)

    def _submit(self, id: int, request: GenerateRequest) -> None:  # noqa: A002 - the protocol's word for it
        if self._decoder is None or self._prompts is None or self._spec is None:
            self._refuse(Refused(id, "failed", "the model is not loaded yet; wait for Ready"))
            return
        sampling = request.sampling or self._spec.sampling
        try:
            prompt = self._prompts.build(request, max_tokens=sampling.max_tokens)
            constraint = self._constraint(request.format, prompt)
        except PromptTooLong as error:
            self._refuse(Refused(id, "too_long", str(error), error.limit))
            return
        except TemplateError as error:
            self._refuse(Refused(id, "template", str(error)))
            return
        except FormatError as error:
            self._refuse(Refused(id, "format", str(error)))
            return
        except Exception as error:  # noqa: BLE001 - a fault that one request brings out must not end the others
            traceback.print_exc()
            self._refuse(Refused(id, "failed", f"its prompt could not be prepared: {error!r}"))
            return
        self._decoder.submit(
            Generation(
                id,
                request.session_id,
                prompt,
                sampling,
                stop=self._spec.stop + sampling.stop,
                continuation=request.continuation,
                constraint=constraint,
            )
        )

    def _constraint(self, wanted: OutputFormat | None, prompt: Prompt) -> FormatConstraint | None:
        if wanted is None:
            return None
        if self._formats is None:
            # Takes up to a second with a large vocabulary, and most slices never need it.
            assert self._model is not None
            self._formats = FormatCompiler(self._model, self._model.vocabulary_size, self._model.end_tokens())
        constraint = self._formats.compile(wanted)
        for token in prompt.continuation_tokens:
            constraint.accept(token)
        return constraint

    def _refuse(self, refusal: Refused) -> None:
        self._parent.send(Step([refusal]))

    def _own_model(self, configuration: Configure) -> None:
        """Load the model and decode; the only thread that touches the llama.cpp context."""
        try:
            decoder = self._load(configuration)
            if decoder is not None:
                decoder.run()
        except BaseException:  # noqa: BLE001 - whatever it was, nobody else could decode
            # Without this thread the process is of no use: leave, so that the server starts a fresh one.
            traceback.print_exc()
            os._exit(70)  # EX_SOFTWARE of sysexits.h

    def _load(self, configuration: Configure) -> Decoder | None:
        began = time.monotonic()
        spec = configuration.spec
        log = LlamaLog()
        try:
            model = LlamaModel(Path(configuration.path), spec, log)
            template_source = configuration.template or model.chat_template
            if template_source is None:
                raise TemplateError(
                    f"slice {spec.name}: {configuration.path} has no chat template; set slices."
                    f'{spec.name}.template, for a base model to "completion"'
                )
            template = ChatTemplate(template_source, bos_token=model.bos_text, eos_token=model.eos_text)
            inference = LlamaContext(model, spec, log)
        except ModelFileError as error:
            self._parent.send(LoadFailed("model_file", str(error)))
            return None
        except (TemplateError, SliceUnavailable) as error:
            self._parent.send(LoadFailed("unavailable", str(error)))
            return None
        context = min(spec.context, model.trained_context, inference.tokens_per_sequence)
        self._spec, self._model = spec, model
        self._prompts = PromptBuilder(
            template, model, context=context, bos_text=model.bos_text if model.adds_bos else ""
        )
        states = self._states = StateStore(
            ram_bytes=spec.paged_bytes,
            folder=_states_folder(configuration),
            on_written=lambda: decoder.wake(),  # noqa: PLW0108 - the decoder is made after its states
        )
        slots = SlotTable(
            inference, states, slots=spec.slots, context=context, sliding_window=model.sliding_window
        )
        decoder = self._decoder = Decoder(
            inference,
            model,
            slots,
            slot_count=spec.slots,
            context=context,
            batch=spec.batch,
            pace=Pace(stall_s=spec.stall_ms / 1000, batch=spec.batch),
            send=self._parent.send,
        )
        self._parent.send(
            Ready(
                context=context,
                vocabulary=model.vocabulary_size,
                template_source="configuration" if configuration.template else "model file",
                kv_bytes=log.kv_bytes,
                weight_bytes=model.weight_bytes,
                load_s=time.monotonic() - began,
                description=model.description,
            )
        )
        return decoder


def _states_folder(configuration: Configure) -> StateFolder | None:
    limit = configuration.spec.disk_bytes
    if configuration.states_folder is None or not limit:
        return None
    try:
        return StateFolder(Path(configuration.states_folder), limit)
    except OSError as error:
        sys.stderr.write(f"KV states stay in RAM: {configuration.states_folder}: {error.strerror}\n")
        return None
