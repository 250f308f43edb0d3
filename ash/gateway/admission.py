"""Who may open a connection at all: host, origin, address line and the number of open sockets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import parse_qs

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

TOKEN_PARAMETERS = frozenset({"token", "access_token", "api_key"})


class HostPolicy:
    """The names under which the server may be addressed, without ports.

    A page that rebinds its own name to a loopback address still sends that name in `Host`; refusing
    unknown names is what stops it (DNS rebinding).
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)

    def allows(self, headers: Sequence[str]) -> bool:
        """Whether the values of the Host headers are exactly one known name, with or without a port."""
        return len(headers) == 1 and _without_port(headers[0].strip().lower()) in self._hosts


class OriginPolicy:
    """The web origins whose pages may connect. Clients that are no browsers send no Origin."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def allows(self, headers: Sequence[str]) -> bool:
        """Whether the values of the Origin headers are absent or one known origin."""
        return not headers or (len(headers) == 1 and headers[0].strip().lower() in self._origins)


def split_target(target: str) -> tuple[str, dict[str, list[str]]]:
    """Path and query of a request target such as `/chat?session=ID`."""
    path, _, query = target.partition("?")
    return path, parse_qs(query, keep_blank_values=True)


def carries_token(query: Iterable[str]) -> bool:
    """Whether the query has a parameter that is meant as a token."""
    return any(name.lower() in TOKEN_PARAMETERS for name in query)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
