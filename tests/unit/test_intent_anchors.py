"""Anchor files of intents: what is read, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash.domain.errors import ConfigError
from ash.routing.anchors import (
    FEWEST_SENTENCES,
    INTENT_TIERS,
    INTENTS,
    IntentAnchors,
    join_anchors,
    load_anchors,
    parse_anchors,
)

HEADER = 'intent = "math"\ntier = "turbo"\ndescription = "sums"\nsentences = [\n'


def file_of(sentences: list[str], header: str = HEADER) -> str:
    return header + "".join(f'  "{sentence}",\n' for sentence in sentences) + "]\n"


def numbered(prefix: str, count: int = FEWEST_SENTENCES) -> list[str]:
    return [f"{prefix} {number}" for number in range(count)]


def anchors_of(intent: str, sentences: list[str] | None = None) -> IntentAnchors:
    header = HEADER.replace("math", intent).replace("turbo", INTENT_TIERS[intent])
    return parse_anchors(file_of(sentences or numbered(intent), header), f"{intent}.toml")


def test_a_file_is_read_with_the_line_of_every_sentence() -> None:
    anchors = parse_anchors(file_of(numbered("add")), "math.toml")

    assert (anchors.intent, anchors.tier, anchors.description) == ("math", "turbo", "sums")
    assert [example.text for example in anchors.sentences] == numbered("add")
    assert [example.line for example in anchors.sentences] == list(range(5, 5 + FEWEST_SENTENCES))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('intent = "math"\ntier = \n', r"math.toml:2: not TOML"),
        ('intent = "math', r"math.toml:1: not TOML"),
        (
            file_of(numbered("a")).replace("math", "maths"),
            r"math.toml:1: unknown intent 'maths'; did you mean 'math'",
        ),
        (
            file_of(numbered("a")).replace("math", "xyz"),
            r"math.toml:1: unknown intent 'xyz'; known are smalltalk",
        ),
        (
            file_of(numbered("a")).replace('tier = "turbo"\n', ""),
            r"math.toml:1: 'tier' is missing; add a line",
        ),
        (
            file_of(numbered("a")).replace('"turbo"', '"nano"'),
            r"math.toml:2: intent 'math' belongs to tier 'turbo'",
        ),
        (file_of(numbered("a")).replace('"turbo"', '"big"'), r"math.toml:2: unknown tier 'big'"),
        (file_of(numbered("a")).replace('"turbo"', "7"), r"math.toml:2: 'tier' must be a text"),
        (
            file_of(numbered("a")).replace("description", "desciption"),
            r"math.toml:3: unknown key 'desciption'; did you",
        ),
        (file_of(numbered("a")).replace('"sums"', '"  "'), r"math.toml:3: 'description' must be a text"),
        (file_of(numbered("a", 29)), r"math.toml:4: 29 texts in 'sentences'; at least 30"),
        (HEADER + "1, 2]", r"math.toml:4: 'sentences' must be a list of texts"),
        (
            file_of([*numbered("a"), "Two  Words", "two words"]),
            r"math.toml:36: 'two words' stands already at math.toml:35",
        ),
        (file_of([*numbered("a"), "  "]), r"math.toml:35: an empty text in 'sentences'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_anchors(text, "math.toml")


def test_lines_are_right_behind_strings_of_every_kind() -> None:
    sentences = (
        """'its', # a comment with a " quote\n"""
        """'''one\ntwo # no comment''', """
        '"""say \\"hi\\" """"]\n'
    )
    text = HEADER + "".join(f'"{s}",\n' for s in numbered("a")) + sentences

    anchors = parse_anchors(text, "math.toml")

    assert [(example.text, example.line) for example in anchors.sentences[-3:]] == [
        ("its", 35),
        ("one\ntwo # no comment", 36),
        ('say "hi" "', 37),
    ]


def test_a_sentence_in_two_files_is_refused_with_both_places() -> None:
    parts = [anchors_of(intent) for intent in INTENTS[:-1]]
    last = anchors_of(INTENTS[-1], [*numbered("z"), "SMALLTALK   3"])
    with pytest.raises(ConfigError, match=r"longform_writing.toml:35: 'SMALLTALK 3' .* smalltalk.toml:8"):
        join_anchors([*parts, last])


def test_every_intent_needs_one_file() -> None:
    parts = [anchors_of(intent) for intent in INTENTS]
    assert len(join_anchors(reversed(parts)).texts()) == len(INTENTS) * FEWEST_SENTENCES
    with pytest.raises(ConfigError, match=r"no anchor file has intent smalltalk;"):
        join_anchors(parts[1:])
    with pytest.raises(ConfigError, match=r"smalltalk.toml:1: intent 'smalltalk' has a file already"):
        join_anchors([*parts, anchors_of("smalltalk", numbered("other"))])


def test_the_hash_follows_the_sentences_alone() -> None:
    parts = [anchors_of(intent) for intent in INTENTS]
    same = join_anchors(
        [
            parse_anchors(
                "# comment\n"
                + file_of(
                    numbered(part.intent),
                    HEADER.replace("math", part.intent)
                    .replace("turbo", part.tier)
                    .replace("sums", "other words"),
                ),
                "moved.toml",
            )
            for part in parts
        ]
    )
    other = join_anchors([anchors_of("smalltalk", numbered("hello")), *parts[1:]])

    assert join_anchors(parts).content_hash == same.content_hash
    assert join_anchors(parts).content_hash != other.content_hash


def test_texts_and_labels_go_together() -> None:
    anchors = join_anchors(anchors_of(intent) for intent in INTENTS)
    for text, label in zip(anchors.texts(), anchors.labels(), strict=True):
        assert text.startswith(label)


def test_the_packaged_anchors_are_sound() -> None:
    anchors = load_anchors()
    assert [part.intent for part in anchors.intents] == list(INTENTS)


def test_folders_that_hold_no_anchors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \*\.toml files"):
        load_anchors(tmp_path)
    (tmp_path / "math.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"math.toml:1: cannot be read as UTF-8"):
        load_anchors(tmp_path)
