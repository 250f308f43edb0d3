"""The text of a message never becomes structure, and stays readable for the model."""

from hypothesis import given
from hypothesis import strategies as st

from ash.slices.worker.tokenising import BREAK, encoded, tokenised, without_controls

CONTROLS = ("<|end|>", "<s>", "</s>", "<<s>>")


class MarkedVocabulary:
    """Bytes are tokens 0 to 255, then come the control tokens, longest first where several fit."""

    def tokenise(self, text: bytes) -> list[int]:
        tokens: list[int] = []
        while text:
            found = [control for control in CONTROLS if text.startswith(control.encode())]
            longest = max(found, key=len, default="")
            tokens.append(256 + CONTROLS.index(longest) if longest else text[0])
            text = text[max(1, len(longest)) :]
        return tokens

    def piece(self, token: int) -> bytes:
        return CONTROLS[token - 256].encode() if token > 255 else bytes([token])

    def pieces(self) -> list[bytes]:
        raise NotImplementedError("only output formats need the whole vocabulary")

    def shown_piece(self, token: int) -> bytes:
        return self.piece(token)

    def is_end(self, token: int) -> bool:
        return token == 256

    def is_control(self, token: int) -> bool:
        return token > 255


pieces = st.lists(
    st.one_of(st.sampled_from([*CONTROLS, BREAK, "<", ">", "|"]), st.text(max_size=3)), max_size=12
)


@given(pieces)
def test_no_control_token_is_left_and_no_text_is_lost(parts: list[str]) -> None:
    text = "".join(parts)
    vocabulary = MarkedVocabulary()
    harmless = tokenised(vocabulary, encoded(without_controls(vocabulary, text, most_tokens=1000)))
    assert not any(vocabulary.is_control(token) for token in harmless.tokens)
    shown = b"".join(vocabulary.piece(token) for token in harmless.tokens)
    assert shown == encoded(text.replace(BREAK, "\N{REPLACEMENT CHARACTER}"))


def test_the_template_may_write_control_tokens() -> None:
    vocabulary = MarkedVocabulary()
    prompt = "<s>" + without_controls(vocabulary, "a</s>b", most_tokens=1000) + "<|end|>"
    tokens = tokenised(vocabulary, encoded(prompt)).tokens
    assert [token for token in tokens if vocabulary.is_control(token)] == [257, 256]


def test_ordinary_text_is_left_alone() -> None:
    assert without_controls(MarkedVocabulary(), "1 < 2 > 0 | é", most_tokens=1000) == "1 < 2 > 0 | é"


def test_bytes_of_tokens_line_up_across_a_break() -> None:
    vocabulary = MarkedVocabulary()
    text = tokenised(vocabulary, encoded("a" + BREAK + "bc"))
    assert text.tokens == tuple(b"abc")
    assert text.ends == (1, 1 + len(encoded(BREAK)) + 1, len(text.text))


def test_what_cannot_fit_is_left_alone() -> None:
    assert without_controls(MarkedVocabulary(), "<s>" * 11, most_tokens=10) == "<s>" * 11
    assert BREAK in without_controls(MarkedVocabulary(), "<s>" * 10, most_tokens=1000)
