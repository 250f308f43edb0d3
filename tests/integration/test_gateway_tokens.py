"""The token file: what it keeps, who may read it, and two processes at once."""

from __future__ import annotations

import fcntl
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from ash.domain.errors import AshError, InvalidRequest, NotFound, RateLimited, Unauthenticated
from ash.domain.values import Role
from ash.gateway.admission import HostPolicy, OriginPolicy, carries_token, split_target
from ash.gateway.auth import MAX_ADDRESSES, Authenticator, FailureLimiter, bearer_token
from ash.gateway.tokens import TokenRegistry


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_start_makes_the_owner_and_later_ones_keep_it(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    assert registry.owner_token() is None
    registry.ensure_owner()
    token = registry.owner_token()
    assert token is not None
    assert token.startswith("ash_")
    principal = registry.authenticate(token)
    assert principal is not None
    assert (principal.name, principal.role) == ("owner", Role.OWNER)
    again = TokenRegistry(tmp_path)
    again.ensure_owner()
    assert again.owner_token() == token
    assert len(again.list()) == 1


def test_a_lost_owner_file_is_not_replaced_while_an_owner_token_is_active(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    registry.ensure_owner()
    (tmp_path / "owner.token").unlink()
    registry.ensure_owner()
    assert registry.owner_token() is None
    registry.revoke("owner")
    registry.ensure_owner()
    token = registry.owner_token()
    assert token is not None
    assert registry.authenticate(token) is not None


def test_the_file_holds_digests_only_and_is_private(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    registry.ensure_owner()
    token = registry.issue("ann", Role.MEMBER)
    text = (tmp_path / "tokens.json").read_text()
    assert token not in text
    assert (registry.owner_token() or "") not in text
    assert {mode(tmp_path / name) for name in ("tokens.json", "owner.token", "tokens.lock")} == {0o600}
    [_, ann] = msgspec.json.decode(text)
    assert set(ann) == {"id", "name", "role", "sha256", "created_at", "revoked_at"}
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.json", "owner.token", "tokens.lock"}


def test_loose_permissions_are_tightened_with_a_warning(tmp_path: Path) -> None:
    TokenRegistry(tmp_path).ensure_owner()
    for name in ("tokens.json", "owner.token"):
        (tmp_path / name).chmod(0o644)
    with capture_logs() as logs:
        TokenRegistry(tmp_path).owner_token()
    assert {mode(tmp_path / name) for name in ("tokens.json", "owner.token")} == {0o600}
    assert [line["log_level"] for line in logs] == ["warning", "warning"]


def test_issue_and_revoke(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path, clock=lambda: 42)
    one, two = registry.issue("ann", Role.MEMBER), registry.issue("bob", Role.OBSERVER)
    ann, bob = registry.authenticate(one), registry.authenticate(two)
    assert ann is not None
    assert bob is not None
    assert (ann.role, bob.role) == (Role.MEMBER, Role.OBSERVER)
    [revoked] = registry.revoke("ann")
    assert (revoked.id, revoked.revoked_at) == (ann.token_id, 42)
    assert registry.authenticate(one) is None
    assert not registry.is_active(ann.token_id)
    registry.revoke(bob.token_id)
    assert registry.authenticate(two) is None
    # The name is free again, and keeps its sessions under a new token.
    assert registry.issue("ann", Role.MEMBER) != one
    assert len(registry.list()) == 3


def test_names_are_unique_and_not_empty(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    registry.issue("ann", Role.MEMBER)
    with pytest.raises(InvalidRequest, match="ann"):
        registry.issue("ann", Role.OWNER)
    with pytest.raises(InvalidRequest):
        registry.issue(" ", Role.OWNER)
    with pytest.raises(NotFound, match="carl"):
        registry.revoke("carl")


def test_another_process_is_noticed(tmp_path: Path) -> None:
    server, command_line = TokenRegistry(tmp_path), TokenRegistry(tmp_path)
    token = command_line.issue("ann", Role.MEMBER)
    assert server.authenticate(token) is None
    assert server.refresh()
    assert not server.refresh()
    principal = server.authenticate(token)
    assert principal is not None
    command_line.revoke("ann")
    assert server.is_active(principal.token_id)
    assert server.refresh()
    assert not server.is_active(principal.token_id)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b'[{"id":"x"}]', b"\xff", b'[{"id":"x","name":"n","role":"king"}]']
)
def test_a_corrupt_file_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens.json").write_bytes(content)
    with pytest.raises(AshError, match=r"tokens\.json cannot be read.*Restore it"):
        TokenRegistry(tmp_path)


def test_a_file_that_breaks_or_vanishes_leaves_the_last_good_tokens(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    token = registry.issue("ann", Role.MEMBER)
    good = (tmp_path / "tokens.json").read_bytes()
    for harm in (lambda p: p.write_text("{"), lambda p: p.unlink()):
        harm(tmp_path / "tokens.json")
        with capture_logs() as logs:
            assert not registry.refresh()
            assert not registry.refresh()
        assert [line["event"] for line in logs] == ["tokens.unreadable"]
        assert registry.authenticate(token) is not None
        # What cannot be read must not be overwritten either.
        with pytest.raises(AshError):
            registry.issue("bob", Role.MEMBER)
    (tmp_path / "tokens.json").write_bytes(good)
    registry.issue("bob", Role.MEMBER)


def test_the_file_is_locked_from_reading_it_to_replacing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = TokenRegistry(tmp_path)
    registry.issue("ann", Role.MEMBER)
    attempts: list[str] = []

    def try_to_lock() -> None:
        with (tmp_path / "tokens.lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                attempts.append("locked")
            else:
                attempts.append("free")

    for step in ("_load", "_save"):
        original = getattr(registry, step)

        def between(*arguments: Any, original: Any = original) -> None:
            try_to_lock()
            original(*arguments)

        monkeypatch.setattr(registry, step, between)
    registry.issue("bob", Role.MEMBER)
    registry.revoke("bob")
    try_to_lock()
    assert attempts == ["locked"] * 4 + ["free"]


@pytest.mark.parametrize("token", ["", "ash_", "\ud800", "x" * 100_000])
def test_odd_tokens_are_unknown(tmp_path: Path, token: str) -> None:
    registry = TokenRegistry(tmp_path)
    registry.ensure_owner()
    assert registry.authenticate(token) is None


def test_failures_are_forgotten_after_the_window_and_addresses_do_not_share() -> None:
    limiter = FailureLimiter(limit=2, window_s=10)
    assert [limiter.failed("a", now) for now in (0, 1, 2, 3)] == [False, False, True, True]
    assert not limiter.failed("b", 3)
    # The failure of second 0 is out; the one of second 1 is not.
    assert [limiter.failed("a", 10), limiter.failed("a", 10.5)] == [False, True]


def test_addresses_are_bounded() -> None:
    limiter = FailureLimiter(limit=1, window_s=1e9)
    for number in range(MAX_ADDRESSES + 1):
        limiter.failed(str(number), 0)
    assert not limiter.failed("0", 0)
    assert limiter.failed(str(MAX_ADDRESSES), 0)


def test_the_authenticator_limits_failures_only(tmp_path: Path) -> None:
    registry = TokenRegistry(tmp_path)
    token = registry.issue("ann", Role.MEMBER)
    authenticator = Authenticator(registry, FailureLimiter(1, 60), lambda: 0.0)
    with pytest.raises(Unauthenticated, match="no token"):
        authenticator.authenticate(None, "a")
    with pytest.raises(RateLimited):
        authenticator.authenticate("wrong", "a")
    with pytest.raises(Unauthenticated, match="unknown or revoked"):
        authenticator.authenticate("wrong", "b")
    assert authenticator.authenticate(token, "a").name == "ann"


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        (["Bearer abc"], "abc"),
        (["bearer  abc "], "abc"),
        (["Bearer"], None),
        (["Bearer "], None),
        (["Basic abc"], None),
        ([], None),
        (["Bearer a", "Bearer b"], None),
    ],
)
def test_bearer_headers(headers: list[str], token: str | None) -> None:
    assert bearer_token(headers) == token


def test_host_and_origin_policies() -> None:
    hosts = HostPolicy(["localhost", "::1", "Ash.Example"])
    assert all(hosts.allows([host]) for host in ("localhost", "localhost:1", "[::1]:8765", "ash.example"))
    assert not any(hosts.allows([host]) for host in ("", "example", "localhost.", "[::2]", "::1", "evil:80"))
    assert not hosts.allows([])
    assert not hosts.allows(["localhost", "localhost"])
    origins = OriginPolicy(["https://App.example/"])
    assert origins.allows([])
    assert origins.allows(["https://app.example"])
    assert not any(
        origins.allows(headers)
        for headers in (["https://app.example:444"], ["http://app.example"], ["null"], [""], ["a", "b"])
    )


def test_request_targets() -> None:
    assert split_target("/chat?session=a%20b&x=") == ("/chat", {"session": ["a b"], "x": [""]})
    assert split_target("//[") == ("//[", {})
    assert carries_token(["a", "TOKEN"])
    assert not carries_token(["session", "tokens"])
