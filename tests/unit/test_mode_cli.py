"""`ash modes eval` against what users get wrong; all of it is found before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ash.cli.commands import app
from ash.domain.errors import ConfigError

ROW = b'{"text": "t", "mode": "creative"}'


def evaluate(*arguments: str) -> None:
    CliRunner().invoke(app, ["modes", "eval", *arguments], catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize("option", ["--data", "--streams"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"rows.jsonl: No such file.*{option} FILE"),
        (ROW + b"\n\xff\n", r"rows.jsonl:2: not UTF-8"),
        (b"\n", r"rows.jsonl:1: holds no rows"),
        (b"\n\n{", r"rows.jsonl:3: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, option: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message.format(option=option)):
        evaluate(option, str(path))


@pytest.mark.parametrize("arguments", [[], ["--data", "a", "--streams", "b"]])
def test_one_of_the_two_files_is_wanted(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["modes", "eval", *arguments])
    assert result.exit_code == 2
    assert "either --data FILE or --streams FILE" in result.output.replace("\n", " ")
