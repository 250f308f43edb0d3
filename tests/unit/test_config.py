from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from ash.config import load
from ash.domain.errors import ConfigError
from ash.slices.catalog import validate
from ash.slices.models import HubReference

ROOT = Path(__file__).resolve().parents[2]
SLICE = '[slices.a]\ntier = "nano"\nmodel = "package:x"\n'


def config(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text + SLICE)
    return path


def test_the_shipped_file_loads() -> None:
    settings = load(ROOT / "config.toml", {})
    assert list(settings.slices) == ["nano", "turbo"]
    assert settings.data_folder == ROOT / "data"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gatway]\nport = 1\n", "unknown key gatway; did you mean gateway?"),
        ("[gateway]\nprt = 1\n", "unknown key gateway.prt; did you mean gateway.port?"),
        ('[gateway]\nport = "x"\n', "gateway.port: Expected `int`"),
        ("[gateway\n", "not TOML"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(config(tmp_path, text), {})
    assert reason in str(caught.value)


def test_an_unknown_key_of_a_slice_names_the_nearest(tmp_path: Path) -> None:
    path = config(tmp_path, "")
    path.write_text(path.read_text() + "contxt = 1\n")
    with pytest.raises(ConfigError, match=r"slices\.a\.contxt; did you mean slices\.a\.context"):
        load(path, {})


def test_the_environment_overrides(tmp_path: Path) -> None:
    environment = {
        "ASH_GATEWAY__PORT": "9000",
        "ASH_STORE__PATH": "/elsewhere",
        "ASH_SLICES__A__SLOTS": "3",
        "ASH_CONFIG": "ignored",
    }
    settings = load(config(tmp_path, ""), environment)
    assert settings.gateway.port == 9000
    assert settings.data_folder == Path("/elsewhere")
    assert settings.slices["a"].slots == 3


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load(tmp_path / "none.toml", {})


def test_the_commented_catalogue_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "config.toml").read_text(encoding="utf-8")
    path = tmp_path / "config.toml"
    path.write_text(re.sub(r"^# (?=\[slices\.|\w+ = )", "", text, flags=re.MULTILINE))
    slices = load(path, {}).slices
    assert set(slices) == {"nano", "turbo", "gemma4_e2b", "gemma4_e4b", "gemma4_12b"}
    for name in set(slices) - {"nano", "turbo"}:
        spec = slices[name]
        assert HubReference.parse(spec.model.removeprefix("hf:")).file.endswith("Q4_K_M.gguf")
        assert spec.sampling.top_k == 64
    validate([msgspec.structs.replace(spec, name=name) for name, spec in slices.items()])
