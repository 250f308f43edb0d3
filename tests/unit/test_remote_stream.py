"""Server-sent events and the chunks in them, however the bytes are cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash.domain.values import Admitted, Delta, EngineItem, Finished
from ash.slices.remote.answer import AnswerReader
from ash.slices.remote.failure import MalformedStream
from ash.slices.remote.protocol import Chunk, decode_chunk
from ash.slices.remote.sse import SseParser

LINE_ENDS = st.sampled_from(["\n", "\r", "\r\n"])
LINES = st.sampled_from(
    ["data: one", "data:two", "data", "data:  x", ": comment", "event: e", "id", "", "", "é✓"]
)


def cut(content: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(content) + 1) for place in places), len(content)]
    return [content[start:end] for start, end in pairwise(edges)]


def parsed(pieces: list[bytes], *, limit: int = 10_000) -> list[str]:
    parser = SseParser(limit=limit)
    return [event for piece in pieces for event in parser.feed(piece)]


def by_the_standard(lines: list[str]) -> list[str]:
    """The rules of the HTML standard, over lines that are whole."""
    events, data = [], []
    for line in lines:
        field, _, value = line.partition(":")
        if not line and data:
            events.append("\n".join(data))
            data = []
        elif field == "data":
            data.append(value.removeprefix(" "))
    return events


@given(st.lists(st.tuples(LINES, LINE_ENDS), max_size=12), st.lists(st.integers(0, 10**6), max_size=8))
def test_events_do_not_depend_on_how_the_stream_was_cut(
    lines: list[tuple[str, str]], places: list[int]
) -> None:
    text = "".join(line + end for line, end in lines)
    # A CR whose line is followed by an empty line that ends with LF is one CR LF.
    normal = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    assert parsed(cut(text.encode(), places)) == by_the_standard(normal)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_any_bytes_are_read(content: bytes, places: list[int]) -> None:
    assert parsed(cut(content, places)) == parsed([content])


def test_a_byte_order_mark_and_bad_utf_8() -> None:
    assert parsed([b"\xef\xbb", b"\xbfdata: a\xffb\n\n"]) == ["a\ufffdb"]


@pytest.mark.parametrize("content", [b"data: " + b"x" * 100, b"data: xxxxxxxxx\n" * 10, b"x" * 101])
def test_nothing_grows_without_bound(content: bytes) -> None:
    bytes_apart = cut(content, list(range(len(content))))
    with pytest.raises(MalformedStream, match="more than 99 bytes"):
        parsed(bytes_apart, limit=99)
    assert parsed(bytes_apart, limit=200) == []


@pytest.mark.parametrize(
    "data", ["", "{", "[]", '"x"', '{"choices": [{"delta": {"content": 3}}]}', '{"a":' * 5000, '{"usage": 1}']
)
def test_what_is_no_chunk(data: str) -> None:
    with pytest.raises(MalformedStream, match="no chat completion chunk"):
        decode_chunk(data)


def chunk(**fields: object) -> Chunk:
    return decode_chunk(json.dumps(fields))


def text_chunk(text: str) -> Chunk:
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "logprobs": None}], model="m")


END = chunk(choices=[{"delta": {}, "finish_reason": "stop"}])


def reader(
    *, stops: tuple[str, ...] = (), continuation: str = "", echoes: bool = False, max_tokens: int = 100
) -> AnswerReader:
    return AnswerReader(
        estimated_tokens=7,
        dropped=2,
        max_tokens=max_tokens,
        stops=stops,
        continuation=continuation,
        echoes=echoes,
        began_s=10.0,
    )


def shown(items: list[EngineItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


def read_all(answer: AnswerReader, pieces: list[str]) -> str:
    items: list[EngineItem] = []
    for piece in pieces:
        items += answer.read(text_chunk(piece), 11.0)
        if answer.stopped:
            return shown(items)
    return shown(items + answer.read(END, 12.0))


@given(st.text(alphabet="ab STOP", max_size=40), st.lists(st.integers(0, 40), max_size=6))
def test_text_ends_in_front_of_a_stop_string_however_it_was_cut(text: str, places: list[int]) -> None:
    pieces = [piece.decode() for piece in cut(text.encode(), places)]
    answer = reader(stops=("STOP",))
    assert read_all(answer, pieces) == text.partition("STOP")[0]
    assert answer.stopped == ("STOP" in text)
    assert answer.finish == "stop"


@given(
    st.text(alphabet="abc", min_size=1, max_size=9),
    st.text(max_size=9),
    st.lists(st.integers(0, 20), max_size=4),
)
def test_a_repeated_beginning_is_shown_once(beginning: str, rest: str, places: list[int]) -> None:
    pieces = [
        piece.decode("utf-8", "replace") for piece in cut((beginning + rest).encode("utf-8", "replace"), [0])
    ]
    assert read_all(reader(continuation=beginning, echoes=True), pieces) == pieces[-1].removeprefix(beginning)
    assert read_all(reader(continuation=beginning), pieces) == pieces[-1]


def test_a_stop_string_that_begins_in_the_continuation() -> None:
    answer = reader(stops=("the end",), continuation="this is the ")
    assert read_all(answer, ["en", "d. And"]) == ""
    assert answer.stopped


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (chunk(choices=[]), Admitted(7, 0, 2)),
        (chunk(prompt_progress={"total": 9, "cache": 4, "processed": 4, "time_ms": 0}), Admitted(9, 4, 2)),
        (chunk(usage={"prompt_tokens": 8}), Admitted(8, 0, 2)),
        (chunk(usage={"prompt_tokens": 8, "prompt_tokens_details": {"cached_tokens": 3}}), Admitted(8, 3, 2)),
        (
            chunk(usage={"prompt_tokens": 8, "prompt_tokens_details": {"cached_tokens": None}}),
            Admitted(8, 0, 2),
        ),
        (chunk(usage=None, error=None), Admitted(7, 0, 2)),
    ],
)
def test_the_first_chunk_admits_with_the_best_numbers_there_are(first: Chunk, expected: Admitted) -> None:
    assert reader().read(first, 11.0) == [expected]


def test_the_end_holds_the_counts_and_times_of_the_endpoint() -> None:
    answer = reader()
    answer.read(text_chunk("a"), 12.0)
    answer.read(text_chunk("b"), 15.0)
    answer.read(chunk(choices=[{"delta": {}, "finish_reason": "length"}]), 15.0)
    assert answer.finished() == Finished("length", 2, prefill_s=2.0, decode_s=3.0)
    answer.read(chunk(choices=[], usage={"prompt_tokens": 8, "completion_tokens": 5}), 16.0)
    assert answer.finished() == Finished("length", 5, 2.0, 3.0, prompt_tokens=8, reused_tokens=0)
    answer.read(chunk(choices=[], timings={"prompt_ms": 500, "predicted_ms": 250.0, "cache_n": 1}), 16.0)
    assert answer.finished() == Finished("length", 5, 0.5, 0.25, prompt_tokens=8, reused_tokens=0)


def test_an_answer_that_does_not_end() -> None:
    answer = reader(max_tokens=2)
    answer.read(text_chunk("x" * 128), 11.0)
    with pytest.raises(MalformedStream, match="max_tokens"):
        answer.read(text_chunk("x"), 11.0)


def test_nothing_is_shown_behind_the_end() -> None:
    answer = reader()
    answer.read(END, 11.0)
    assert answer.read(text_chunk("late"), 12.0) == []
