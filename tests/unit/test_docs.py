"""The documentation names every setting and every method."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ash.config import Settings
from ash.domain.values import Sampling
from ash.gateway.codec import CODES
from ash.gateway.params import ALL, Params
from ash.slices.spec import RemoteSpec, SliceSpec

DOCS = Path(__file__).resolve().parents[2] / "docs"


def documented_keys() -> dict[str, set[str]]:
    """Table of config.toml -> keys in the first column of its section."""
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `\[(.+)\]`$", text, flags=re.MULTILINE)[1:]
    return {
        name: set(re.findall(r"^\| `(\w+)` \|", body, flags=re.MULTILINE))
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


def keys(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def settings_tables() -> list[tuple[str, set[str]]]:
    tables = [
        (field.name, keys(field.type))
        for field in msgspec.structs.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
    ]
    # The name of a slice is the key of its table.
    return [
        *tables,
        ("slices.NAME", keys(SliceSpec) - {"name"}),
        ("slices.NAME.remote", keys(RemoteSpec)),
        ("slices.NAME.sampling", keys(Sampling)),
    ]


@pytest.mark.parametrize(
    ("table", "expected"), settings_tables(), ids=[table for table, _ in settings_tables()]
)
def test_every_setting_is_documented_and_no_other(table: str, expected: set[str]) -> None:
    assert documented_keys()[table] == expected


def test_every_table_is_documented_and_no_other() -> None:
    assert set(documented_keys()) == {table for table, _ in settings_tables()}


@pytest.mark.parametrize("params", ALL, ids=lambda params: params.method)
def test_every_method_is_documented_with_its_parameters(params: type[Params]) -> None:
    lines = (DOCS / "protocol.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{params.method}` |")]
    if params.method == "initialize":
        row += "".join(line for line in lines if line.startswith("initialize {"))
    for field in msgspec.structs.fields(params):
        assert re.search(rf"\b{field.encode_name}\b", row), field.encode_name


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_every_error_kind_is_documented_with_its_code(kind: str, code: int) -> None:
    assert f"| {code} | `{kind}` |" in (DOCS / "protocol.md").read_text(encoding="utf-8")
