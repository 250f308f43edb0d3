"""The two threads of a worker: one talks to the server and prepares prompts, one decodes."""

from __future__ import annotations

import os
import threading
import time
import traceback
from pathlib import Path
from typing import assert_never

from ash.domain.errors import ModelFileError, PromptTooLong, SliceUnavailable, TemplateError
from ash.domain.values import GenerateRequest
from ash.ipc.parent import ParentConnection
from ash.slices.spec import SliceSpec
from ash.slices.worker.decoder import Decoder
from ash.slices.worker.generation import Generation
from ash.slices.worker.llama import LlamaContext, LlamaLog, LlamaModel
from ash.slices.worker.messages import (
    Acknowledge,
    Cancel,
    Configure,
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
from ash.slices.worker.prompts import PromptBuilder
from ash.slices.worker.slots import SlotTable
from ash.slices.worker.template import ChatTemplate


class WorkerService:
    """Serves one model over `parent` until the server closes the channel."""

    def __init__(self, parent: ParentConnection[ToWorker]) -> None:
        self._parent = parent
        self._decoder: Decoder | None = None
        self._prompts: PromptBuilder | None = None
        self._spec: SliceSpec | None = None

    def run(self) -> None:
        """The loop of the thread that talks to the server.

        Raises:
            FrameError: the server does not speak the protocol.
        """
        for message in self._parent.messages():
            match message:
                case Configure():
                    # The model is loaded where it is used, so that pings are answered meanwhile.
                    threading.Thread(
                        target=self._own_model, args=(message,), name="decode", daemon=True
                    ).start()
                case Generate():
                    self._submit(message.id, message.request)
                case Cancel():
                    if self._decoder is not None:
                        self._decoder.cancel(message.id)
                case Acknowledge():
                    if self._decoder is not None:
                        self._decoder.acknowledge(message.id, message.tokens)
                case Ping():
                    statistics = self._decoder.statistics() if self._decoder else WorkerStatistics()
                    self._parent.send(Pong(message.number, statistics))
                case _:
                    assert_never(message)

    def _submit(self, id: int, request: GenerateRequest) -> None:  # noqa: A002 - the protocol's word for it
        if self._decoder is None or self._prompts is None or self._spec is None:
            self._refuse(Refused(id, "failed", "the model is not loaded yet; wait for Ready"))
            return
        sampling = request.sampling or self._spec.sampling
        try:
            prompt = self._prompts.build(request, max_tokens=sampling.max_tokens)
        except PromptTooLong as error:
            self._refuse(Refused(id, "too_long", str(error), error.limit))
            return
        except TemplateError as error:
            self._refuse(Refused(id, "template", str(error)))
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
            )
        )

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
        self._spec = spec
        self._prompts = PromptBuilder(
            template, model, context=context, bos_text=model.bos_text if model.adds_bos else ""
        )
        slots = SlotTable(
            inference,
            slots=spec.slots,
            context=context,
            sliding_window=model.sliding_window,
            paged_bytes=spec.paged_bytes,
        )
        self._decoder = Decoder(
            inference,
            model,
            slots,
            context=context,
            batch=spec.batch,
            prefill_chunk=64,
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
        return self._decoder
