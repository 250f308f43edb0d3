"""Anchor files of modes and requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash.domain.errors import ConfigError
from ash.domain.values import MODES
from ash.modes.anchors import (
    FEWEST_REQUESTS,
    FEWEST_TEXTS,
    NOTHING,
    join_anchors,
    load_anchors,
    load_requests,
    parse_anchors,
)


def mode_file(mode: str, genre: str | None = None, prefix: str = "") -> str:
    texts = "".join(f'"{prefix}{mode} {genre} {n}",\n' for n in range(FEWEST_TEXTS))
    line = f'genre = "{genre}"\n' if genre else ""
    return f'mode = "{mode}"\n{line}description = "d"\ntexts = [\n{texts}]\n'


def request_file(label: str, count: int = FEWEST_REQUESTS) -> str:
    texts = "".join(f'"{label} {n}",\n' for n in range(count))
    return f'asks_for = "{label}"\ndescription = "d"\ntexts = [\n{texts}]\n'


def test_texts_modes_and_genres_go_together() -> None:
    kinds = [("analytic", None), ("conversational", None), ("creative", "rap"), ("creative", "story")]
    anchors = join_anchors(parse_anchors(mode_file(*kind), f"{kind}.toml") for kind in reversed(kinds))

    rows = list(zip(anchors.texts(), anchors.modes(), anchors.genres(), strict=True))
    assert len(rows) == 4 * FEWEST_TEXTS
    for text, mode, genre in rows:
        assert text.startswith(f"{mode} {genre} ")


def test_what_is_wrong_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"a.toml:1: unknown mode 'creativ'; did you mean 'creative'"):
        parse_anchors(mode_file("creativ"), "a.toml")
    with pytest.raises(ConfigError, match=r"a.toml:2: mode 'analytic' has no genres"):
        parse_anchors(mode_file("analytic", "essay"), "a.toml")
    with pytest.raises(ConfigError, match=r"a.toml:3: \d+ texts in 'texts'; at least"):
        parse_anchors('mode = "analytic"\ndescription = "d"\ntexts = ["one"]', "a.toml")


def test_every_mode_needs_a_file_and_every_kind_only_one() -> None:
    parts = [parse_anchors(mode_file(mode), f"{mode}.toml") for mode in MODES]
    with pytest.raises(ConfigError, match="no anchor file has mode creative"):
        join_anchors([parts[0], parts[2]])
    again = parse_anchors(mode_file("creative", prefix="again "), "again.toml")
    with pytest.raises(ConfigError, match=r"again.toml:1: 'creative' has a file already, creative.toml"):
        join_anchors([*parts, again])


def test_requests_need_every_label_once(tmp_path: Path) -> None:
    for label in (*MODES, NOTHING):
        (tmp_path / f"{label}.toml").write_text(request_file(label))
    requests = load_requests(tmp_path)
    assert set(requests.labels()) == {*MODES, NOTHING}
    assert all(
        text.startswith(label) for text, label in zip(requests.texts(), requests.labels(), strict=True)
    )

    (tmp_path / "zwei.toml").write_text(request_file("nothing"))
    with pytest.raises(ConfigError, match=r"zwei.toml:1: 'nothing' has a file already"):
        load_requests(tmp_path)
    (tmp_path / "zwei.toml").unlink()
    (tmp_path / "nothing.toml").unlink()
    with pytest.raises(ConfigError, match="no file has asks_for nothing"):
        load_requests(tmp_path)


def test_the_packaged_files_are_sound() -> None:
    anchors = load_anchors()
    assert set(anchors.modes()) == set(MODES)
    assert len(set(anchors.genres()) - {None}) > 1
    assert set(load_requests().labels()) == {*MODES, NOTHING}
    assert anchors.content_hash != load_requests().content_hash
