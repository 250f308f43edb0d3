"""Remote slices in the catalogue: what has to hold of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ash.domain.errors import ConfigError
from ash.slices.catalog import check, validate
from ash.slices.spec import RemoteSpec, SliceSpec

URL = "http://127.0.0.1:8080/v1"


def remote(model: str = "openai:m", url: str = URL, **settings: Any) -> SliceSpec:
    return SliceSpec("far", "turbo", model, remote=RemoteSpec(url, **settings))


def test_remote_slices_that_are_right() -> None:
    validate([remote(), SliceSpec("near", "nano", "package:x", fallback="far")])
    validate([remote(url="https://models.example/some/base/", retries=0, backoff_s=0.0)])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            SliceSpec("far", "nano", "openai:m"),
            r"slices\.far\.model = 'openai:m' needs a table \[slices\.far\.remote\]",
        ),
        (remote("package:x"), r"slices\.far\.remote belongs to a model at an endpoint"),
        (remote("openai: "), "write the name of the model"),
        (remote(url="127.0.0.1:8080"), "no http or https address"),
        (remote(url="ftp://host/v1"), "no http or https address"),
        (remote(url="http:///v1"), "no http or https address"),
        (remote(url="http://[::1/v1"), "no web address"),
        (remote(url="http://host:99999/v1"), "no web address"),
        (remote(url=URL + "?key=x"), "leave out what follows"),
        (remote(concurrency=0), r"slices\.far\.remote\.concurrency = 0"),
        (remote(retries=-1), "retries = -1: it has to be 0 or more"),
        (remote(backoff_s=float("nan")), "backoff_s = nan"),
        (remote(breaker_failures=0), "breaker_failures = 0"),
        (remote(idle_timeout_s=0.0), r"idle_timeout_s = 0\.0: it has to be above 0"),
        (remote(first_token_timeout_s=float("inf")), "first_token_timeout_s = inf"),
    ],
)
def test_remote_slices_that_are_wrong(spec: SliceSpec, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate([spec])


def test_a_key_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        validate([remote(url="https://user:hunter2@host/v1")])
    assert "hunter2" not in str(caught.value)


def test_there_is_no_file_to_check(tmp_path: Path) -> None:
    result = check(remote(), cache_folder=tmp_path)
    assert (result.endpoint, result.problem, result.path) == (URL, None, None)
