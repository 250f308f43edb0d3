"""Token sequences: how much of a prompt the KV cache already has."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ash.slices.worker.sequence import TokenisedText, TokenSequence

WORDS = [b"a", b"b", b"ab", b"ba", b"aab", b"\n"]
word_lists = st.lists(st.sampled_from(range(len(WORDS))), max_size=12)


def text_of(tokens: list[int]) -> TokenisedText:
    pieces = [WORDS[token] for token in tokens]
    return TokenisedText.of(b"".join(pieces), tokens, pieces)


def sequence_of(tokens: list[int]) -> TokenSequence:
    sequence = TokenSequence()
    sequence.extend(text_of(tokens))
    return sequence


@settings(deadline=None)  # a slow machine is no fault
@given(word_lists, word_lists)
def test_the_common_boundary_is_the_longest(mine: list[int], theirs: list[int]) -> None:
    ours, others = sequence_of(mine).common_boundary(text_of(theirs))
    left, right = text_of(mine[:ours]).text, text_of(theirs[:others]).text
    assert left == right

    def ends(tokens: list[int]) -> set[bytes]:
        return {text_of(tokens[:count]).text for count in range(len(tokens) + 1)}

    assert len(left) == max(len(text) for text in ends(mine) & ends(theirs))


@settings(deadline=None)  # a slow machine is no fault
@given(word_lists, word_lists)
def test_a_prompt_is_the_kept_part_and_the_rest(mine: list[int], theirs: list[int]) -> None:
    sequence, prompt = sequence_of(mine), text_of(theirs)
    ours, others = sequence.common_boundary(prompt)
    sequence.truncate(ours)
    sequence.extend(prompt.behind(others))
    assert sequence.is_prefix_of(prompt.text)
    assert sequence.text_behind(prompt.text) == b""
    assert sequence.tokens == mine[:ours] + theirs[others:]


@settings(deadline=None)  # a slow machine is no fault
@given(word_lists, word_lists)
def test_appending_is_extending(first: list[int], second: list[int]) -> None:
    sequence = sequence_of(first)
    for token in second:
        sequence.append(token, WORDS[token])
    whole = text_of(first + second)
    assert sequence.is_prefix_of(whole.text + b"more")
    assert sequence.text_behind(whole.text + b"more") == b"more"


def test_text_that_its_pieces_do_not_join_to_is_used_whole_or_not_at_all() -> None:
    odd = TokenisedText.of(b"hello", [1, 2], [b" hel", b"lo"])
    sequence = TokenSequence()
    sequence.extend(text_of([0]))
    sequence.extend(odd)
    longer = TokenisedText.of(b"ahello b", [0, 7, 8], [b"a", b"hello", b" b"])
    assert sequence.common_boundary(longer) == (3, 2)
    other = TokenisedText.of(b"ahell", [0, 9], [b"a", b"hell"])
    assert sequence.common_boundary(other) == (1, 1)


def test_truncating_takes_back_what_is_cached() -> None:
    sequence = sequence_of([0, 1, 2])
    sequence.cached = 3
    assert sequence.pending == 0
    sequence.truncate(1)
    assert (sequence.tokens, sequence.cached, sequence.pending) == ([0], 1, 0)
    sequence.clear()
    assert (len(sequence), sequence.cached) == (0, 0)
