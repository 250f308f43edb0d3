"""The frame codec: any cut of the stream gives the same messages, and garbage is named."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ash.domain.errors import FrameError
from ash.ipc.frames import FrameDecoder, FrameEncoder


class Note(msgspec.Struct, frozen=True, tag="note"):
    text: str
    count: int


class Mark(msgspec.Struct, frozen=True, tag="mark"):
    data: bytes


Message = Note | Mark
messages = st.one_of(
    st.builds(Note, text=st.text(), count=st.integers(-(2**63), 2**63 - 1)),
    st.builds(Mark, data=st.binary(max_size=300)),
)


@settings(deadline=None)  # a slow machine is no fault
@given(st.lists(messages, max_size=8), st.lists(st.integers(1, 40), min_size=1))
def test_messages_survive_any_cut_of_the_stream(sent: list[Message], sizes: list[int]) -> None:
    encoder, decoder = FrameEncoder(), FrameDecoder[Message](Message)
    stream = b"".join(encoder.encode(message) for message in sent)
    received, at, turn = [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        received += decoder.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    decoder.finish()
    assert received == sent


@settings(deadline=None)  # a slow machine is no fault
@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_frame_errors(data: bytes) -> None:
    decoder = FrameDecoder[Message](Message, max_frame_bytes=64)
    try:
        decoder.feed(data)
        decoder.finish()
    except FrameError:
        return
    assert data == b""


def test_a_long_frame_is_refused_at_its_header() -> None:
    decoder = FrameDecoder[Message](Message, max_frame_bytes=100)
    with pytest.raises(FrameError, match="announces 101 bytes, the limit is 100"):
        decoder.feed((101).to_bytes(4, "big"))


def test_a_long_message_is_not_encoded() -> None:
    with pytest.raises(FrameError, match=r"a Mark of .* does not fit"):
        FrameEncoder(max_frame_bytes=10).encode(Mark(data=b"x" * 20))


def test_a_stream_cut_inside_a_frame_is_named() -> None:
    decoder = FrameDecoder[Message](Message)
    frame = FrameEncoder().encode(Note("a", 1))
    assert decoder.feed(frame[:-1]) == []
    with pytest.raises(FrameError, match="ended inside a frame"):
        decoder.finish()


def test_a_message_of_another_type_is_named() -> None:
    with pytest.raises(FrameError, match="is not a message"):
        FrameDecoder[Message](Message).feed(FrameEncoder().encode({"type": "other"}))


def test_text_without_utf_8_is_named() -> None:
    with pytest.raises(FrameError, match="lone surrogate"):
        FrameEncoder().encode(Note("a\ud800", 1))
