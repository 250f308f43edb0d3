"""JSON-RPC 2.0 without I/O: text frames to requests, results and errors to text frames.

`parse` never raises: what is wrong with a frame becomes an `InvalidFrame` with the answer to send.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from ash.domain.errors import AshError
from ash.gateway.params import ALL, Params

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
SERVER_ERROR: Final = -32000
"""For a kind without a code of its own; clients go by `data.kind`."""

CODES: Final[dict[str, int]] = {
    "invalid": INVALID_PARAMS,
    "internal": INTERNAL_ERROR,
    "unauthenticated": -32001,
    "forbidden": -32002,
    "not_found": -32003,
    "busy": -32004,
    "too_large": -32005,
    "rate_limited": -32006,
    "events_gone": -32007,
    "slice_unavailable": -32008,
    "shutting_down": -32009,
    "storage_full": -32010,
    "store": -32011,
    "slice_error": -32012,
    "slice_crashed": -32013,
    "template_error": -32014,
    "encoder_unavailable": -32015,
    "slow_consumer": -32016,
}

NULL_ID: Final = b"null"
"""The id of an answer to a frame whose id could not be read (JSON-RPC 2.0, section 5)."""


class Request(Struct, frozen=True):
    """A call that wants an answer. `id` is the JSON text of the client's id, echoed as it was sent."""

    id: bytes
    params: Params


class Notification(Struct, frozen=True):
    """A call without an id: it is executed and never answered, not even when it fails."""

    params: Params


class InvalidFrame(Struct, frozen=True):
    """A frame that cannot be executed.

    Attributes:
        response: the error to send; None when the frame was a notification, which gets no answer.
        code: the JSON-RPC error code.
        reason: what was wrong, for logs.
    """

    response: bytes | None
    code: int
    reason: str


Parsed = Request | Notification | InvalidFrame


class _Frame(Struct):
    jsonrpc: Raw = Raw()
    method: Raw = Raw()
    id: Raw = Raw()
    params: Raw = Raw()


class _Result(Struct, frozen=True):
    id: Raw
    result: Any
    jsonrpc: str = "2.0"


class _ErrorBody(Struct, frozen=True):
    code: int
    message: str
    data: dict[str, Any]


class _Error(Struct, frozen=True):
    id: Raw
    error: _ErrorBody
    jsonrpc: str = "2.0"


class _Call(Struct, frozen=True, omit_defaults=True):
    method: str
    params: Any
    id: str | int | float | msgspec.UnsetType | None = msgspec.UNSET
    # No default: omit_defaults would drop it.
    jsonrpc: str = msgspec.field(default_factory=lambda: "2.0")


_METHODS: Final = {params.method: params for params in ALL}
_frame_decoder = msgspec.json.Decoder(_Frame)
_id_decoder = msgspec.json.Decoder(str | int | float | None)
_params_decoders = {name: msgspec.json.Decoder(params) for name, params in _METHODS.items()}

# msgspec ends its messages with the path, or names a missing field inside the text.
_AT_PATH = re.compile(r"^(?P<what>.*) - at `(?:key in )?\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]+)`")


class _Malformed(Exception):
    """Internal to `parse`: carries the error that the client is to see."""

    def __init__(self, code: int, message: str, *, frame_id: bytes = NULL_ID, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.frame_id = frame_id
        self.details = details


def parse(frame: str | bytes) -> Parsed:
    """The request or notification in one text frame. Never raises.

    Malformed JSON is -32700; a batch or anything else that is not a request object -32600; an unknown
    method -32601; missing or wrongly typed parameters -32602 with `data.field` naming the first of them.
    """
    try:
        fields = _split(frame)
        frame_id = _id_of(fields)
        if frame_id is None:
            return _parse_notification(fields)
        return Request(frame_id, _params_of(fields, frame_id))
    except _Malformed as error:
        response = encode_failure(
            error.frame_id, error.code, str(error), {"kind": "invalid", **error.details}
        )
        return InvalidFrame(response, error.code, str(error))


def frame_id(frame: str | bytes) -> bytes:
    """The id of a frame that is not going to be executed, `null` when it has none. Never raises.

    Lets an over-long request be answered under its own id without decoding its parameters.
    """
    try:
        return _id_of(_split(frame)) or NULL_ID
    except _Malformed:
        return NULL_ID


def encode_result(request_id: bytes, result: Any) -> bytes:
    """The answer to a request that succeeded."""
    return msgspec.json.encode(_Result(Raw(request_id), result))


def encode_error(request_id: bytes, error: AshError) -> bytes:
    """The answer to a request that failed on purpose: code by kind, `data` with kind and details."""
    code = CODES.get(error.kind, SERVER_ERROR)
    return encode_failure(request_id, code, str(error), {"kind": error.kind, **error.details()})


def encode_failure(request_id: bytes, code: int, message: str, data: dict[str, Any]) -> bytes:
    """An error answer in full."""
    return msgspec.json.encode(_Error(Raw(request_id), _ErrorBody(code, message, data)))


def encode_request(request_id: str | int | float | None, params: Params) -> bytes:
    """What a client sends to call a method."""
    return msgspec.json.encode(_Call(params.method, params, request_id))


def encode_notification(method: str, params: Any) -> bytes:
    """A call without an id, such as `server/heartbeat`."""
    return msgspec.json.encode(_Call(method, params))


def encode_event(params_json: bytes) -> bytes:
    """A `session/event` notification around params that are JSON already and shared by all receivers."""
    return b'{"jsonrpc":"2.0","method":"session/event","params":' + params_json + b"}"


def _split(frame: str | bytes) -> _Frame:
    """The members of a request object, undecoded."""
    try:
        return _frame_decoder.decode(frame)
    except msgspec.ValidationError:
        # Decoding stopped at the first character; whether the rest is JSON decides between the codes.
        _check_syntax(frame)
        raise _Malformed(
            INVALID_REQUEST, "a frame holds one request object; batches and bare values are not supported"
        ) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise _Malformed(PARSE_ERROR, f"the frame is not JSON: {error}") from None
    except RecursionError:
        raise _Malformed(PARSE_ERROR, "the JSON is nested too deeply") from None


def _check_syntax(frame: str | bytes) -> None:
    try:
        msgspec.json.decode(frame, type=Raw)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise _Malformed(PARSE_ERROR, f"the frame is not JSON: {error}") from None
    except RecursionError:
        raise _Malformed(PARSE_ERROR, "the JSON is nested too deeply") from None


def _id_of(fields: _Frame) -> bytes | None:
    """The id's JSON text; None for a notification."""
    text = bytes(fields.id)
    if not text:
        return None
    try:
        _id_decoder.decode(text)
    except msgspec.DecodeError:
        raise _Malformed(INVALID_REQUEST, "`id` must be a string, a number or null", field="id") from None
    return text


def _parse_notification(fields: _Frame) -> Notification | InvalidFrame:
    try:
        return Notification(_params_of(fields, NULL_ID))
    except _Malformed as error:
        # A broken request object may have meant to have an id; a well-formed call without one did not.
        if error.code == INVALID_REQUEST:
            raise
        return InvalidFrame(None, error.code, str(error))


def _params_of(fields: _Frame, frame_id: bytes) -> Params:
    if bytes(fields.jsonrpc) != b'"2.0"':
        raise _Malformed(INVALID_REQUEST, '`jsonrpc` must be "2.0"', frame_id=frame_id, field="jsonrpc")
    method = _method_of(fields, frame_id)
    decoder = _params_decoders.get(method)
    if decoder is None:
        raise _Malformed(METHOD_NOT_FOUND, _unknown_method(method), frame_id=frame_id)
    params = bytes(fields.params) or b"{}"
    try:
        return decoder.decode(params)
    except msgspec.ValidationError as error:
        field, message = _explain(str(error))
        details = {"field": field} if field else {}
        raise _Malformed(INVALID_PARAMS, f"{method}: {message}", frame_id=frame_id, **details) from None
    except (msgspec.DecodeError, RecursionError):
        # The syntax was checked with the frame: what is left is depth beyond the interpreter's stack.
        raise _Malformed(
            INVALID_PARAMS, f"{method}: params are nested too deeply", frame_id=frame_id
        ) from None


def _method_of(fields: _Frame, frame_id: bytes) -> str:
    try:
        return msgspec.json.decode(bytes(fields.method), type=str)
    except msgspec.DecodeError:
        raise _Malformed(
            INVALID_REQUEST, "`method` must be a string", frame_id=frame_id, field="method"
        ) from None


def _unknown_method(method: str) -> str:
    # Names are short; a long one is noise that should neither be compared nor sent back.
    shown = method[:64]
    nearest = difflib.get_close_matches(shown, _METHODS, n=1)
    hint = f"; did you mean `{nearest[0]}`?" if nearest else "; docs/protocol.md lists the methods"
    return f"there is no method `{shown}`{hint}"


def _explain(error: str) -> tuple[str | None, str]:
    """The field that msgspec complains about, and the complaint with that field in front."""
    what, path = error, ""
    if match := _AT_PATH.match(error):
        what, path = match["what"], match["path"]
    if match := _MISSING.search(what):
        path = f"{path}.{match['field']}" if path else match["field"]
        return path, f"params.{path} is required"
    if path:
        return path, f"params.{path}: {_lower_first(what)}"
    return None, f"params: {_lower_first(what)}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
