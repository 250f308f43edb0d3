"""Words: how any text becomes a full-text query, and the in-memory counterpart of SQLite's FTS5. Pure.

Rules of a search, the same in both stores: the query is cut at white space; every piece must occur in the
message, as a run of adjacent words where punctuation divides it ("state-of-the-art"); case and diacritics do
not matter; a piece without a letter or digit asks for nothing.
"""

from __future__ import annotations

import unicodedata

MAX_PIECES = 64
"""Pieces of a query beyond these are ignored: a pasted page must not become a thousand-fold join."""

SNIPPET_WORDS = 24

Word = tuple[str, int, int]
"""A folded word and where it starts and ends in its text."""


def pieces(query: str) -> list[str]:
    """The pieces of `query` that ask for something."""
    # FTS5 reads its query as a C string, so NUL would end it inside a quotation; lone surrogates cannot
    # be bound.
    clean = query.replace("\x00", " ").encode("utf-8", "ignore").decode()
    return [piece for piece in clean.split() if any(character.isalnum() for character in piece)][:MAX_PIECES]


def full_text_query(query: str) -> str | None:
    """`query` in FTS5's language, every piece a quoted string; None when it asks for nothing."""
    quoted = ['"' + piece.replace('"', '""') + '"' for piece in pieces(query)]
    return " ".join(quoted) or None


def words(text: str) -> list[Word]:
    """The words of `text` as FTS5's tokenizer unicode61 with remove_diacritics=2 finds them."""
    found: list[Word] = []
    folded: list[str] = []
    start = 0
    for position, character in enumerate(text):
        category = unicodedata.category(character)
        # A combining mark goes on with the word that it stands in, and adds nothing to it.
        if category[0] in "LN" or category == "Co" or (category == "Mn" and folded):
            start = start if folded else position
            folded.append(_fold(character))
        elif folded:
            found.append(("".join(folded), start, position))
            folded = []
    if folded:
        found.append(("".join(folded), start, len(text)))
    return found


def _fold(character: str) -> str:
    decomposed = unicodedata.normalize("NFD", character.lower())
    return "".join(part for part in decomposed if unicodedata.category(part) != "Mn")


def hits(query: str, text_words: list[Word]) -> set[int] | None:
    """Indexes of the words in `text_words` that match `query`; None when a piece is missing."""
    texts = [word for word, _, _ in text_words]
    found: set[int] = set()
    for piece in pieces(query):
        phrase = [word for word, _, _ in words(piece)]
        starts = [at for at in range(len(texts)) if texts[at : at + len(phrase)] == phrase]
        if phrase and not starts:
            return None
        found.update(at + offset for at in starts for offset in range(len(phrase)))
    return found or None


def snippet(text: str, text_words: list[Word], matched: set[int]) -> str:
    """`text` around its first match, the matched words between [ and ]."""
    first = max(0, min(matched) - SNIPPET_WORDS // 2)
    shown = range(first, min(first + SNIPPET_WORDS, len(text_words)))
    start = 0 if first == 0 else text_words[first][1]
    whole = shown.stop == len(text_words)
    end = len(text) if whole else text_words[shown.stop - 1][2]
    parts = ["" if start == 0 else "…"]
    for index in shown:
        _, word_start, word_end = text_words[index]
        if index in matched:
            parts.append(f"{text[start:word_start]}[{text[word_start:word_end]}]")
            start = word_end
    return "".join([*parts, text[start:end], "" if whole else "…"])
