"""Stop strings and characters in a text that comes in pieces: the cut must not matter."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ash.slices.worker.text import OutputText, StopStrings

# Few letters, so that stop strings do occur and overlap.
letters = st.text(alphabet="ab\n", max_size=40)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text in front of the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


@settings(deadline=None)  # a slow machine is no fault
@given(letters, stop_lists, st.lists(st.integers(0, 6), max_size=20))
@example("abb", ["abb", "bb"], [1, 1])
@example("aab", ["ab"], [1, 1, 1])
def test_any_cut_gives_the_naive_result(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopStrings(stops)
    shown, stopped = "", False
    for piece in cut(text, sizes):
        result = matcher.feed(piece)
        shown += result.text
        # What is shown never has to be taken back.
        assert naive(text, stops)[0].startswith(shown)
        if result.stopped:
            stopped = True
            break
    if not stopped:
        shown += matcher.finish()
    assert (shown, stopped) == naive(text, stops)
    assert not any(stop in shown for stop in stops)


@settings(deadline=None)  # a slow machine is no fault
@given(letters, letters, stop_lists, st.lists(st.integers(0, 6), max_size=20))
def test_a_stop_string_may_begin_in_what_was_shown(
    before: str, text: str, stops: list[str], sizes: list[int]
) -> None:
    before = naive(before, stops)[0]
    matcher = StopStrings(stops, shown=before)
    shown, stopped = "", False
    for piece in cut(text, sizes):
        result = matcher.feed(piece)
        shown += result.text
        if result.stopped:
            stopped = True
            break
    if not stopped:
        shown += matcher.finish()
    expected, expected_stop = naive(before + text, stops)
    assert stopped == expected_stop
    assert shown == expected[len(before) :]


def test_undecided_text_is_held_back() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.feed("Hello\nUs").text == "Hello"
    assert matcher.feed("e").text == ""
    assert matcher.feed(" it").text == "\nUse it"


def test_an_empty_stop_string_is_ignored() -> None:
    assert StopStrings([""]).feed("text").text == "text"


@settings(deadline=None)  # a slow machine is no fault
@given(st.text(max_size=30), st.lists(st.integers(1, 3), min_size=1, max_size=60))
def test_characters_are_shown_whole(text: str, sizes: list[int]) -> None:
    output = OutputText(StopStrings([]))
    data, shown, at = text.encode(), "", 0
    for size in sizes:
        result = output.feed(data[at : at + size])
        shown += result.text
        at += size
        assert text.startswith(shown)
    shown += output.feed(data[at:]).text + output.finish()
    assert shown == text


def test_a_character_cut_at_the_very_end_is_replaced_only_there() -> None:
    output = OutputText(StopStrings([]))
    assert output.feed("a€".encode()[:-1]).text == "a"
    assert output.finish() == "\N{REPLACEMENT CHARACTER}"


@settings(deadline=None)  # a slow machine is no fault
@given(st.text(alphabet=" \nab", max_size=8), st.sampled_from(["", " ", "\n\n"]), st.lists(st.integers(1, 3)))
def test_the_lead_is_left_out_once(text: str, lead: str, sizes: list[int]) -> None:
    output = OutputText(StopStrings([]), lead=lead)
    shown = "".join(output.feed(piece.encode()).text for piece in cut(text, sizes))
    assert shown + output.finish() == text.removeprefix(lead)


@settings(deadline=None)  # a slow machine is no fault
@given(st.binary(max_size=60), st.lists(st.integers(1, 3), min_size=1, max_size=60))
def test_bytes_that_are_no_text_do_not_depend_on_the_cut(data: bytes, sizes: list[int]) -> None:
    output = OutputText(StopStrings([]))
    shown, at = "", 0
    for size in sizes:
        shown += output.feed(data[at : at + size]).text
        at += size
    shown += output.feed(data[at:]).text + output.finish()
    assert shown == data.decode("utf-8", "replace")
