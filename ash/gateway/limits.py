"""The numbers that bound what clients can make the gateway do."""

from __future__ import annotations

from msgspec import Struct


class GatewayLimits(Struct, frozen=True):
    """Limits of the gateway; sizes are bytes, names ending in `_s` are seconds.

    Attributes:
        max_payload: largest frame of an authenticated client that is executed; told to clients.
        hard_payload: larger frames are not even read: close 1009. In between, an error names the limit.
        max_first_frame: largest `initialize` that is executed.
        hard_first_frame: `hard_payload` before authentication.
        max_buffered: live events that may wait for one slow consumer; told to clients.
        heartbeat_ms: how often the server shows that it lives; a client that is silent for twice as long
            is closed with 4000.
        first_frame_timeout_s: how long a client may take for the opening handshake, then for `initialize`.
        close_timeout_s: how long a peer may take to answer a close frame before the socket is dropped.
        max_connections: open sockets in total; beyond it the handshake is answered 503.
        max_unauthenticated: open sockets that have not authenticated yet; beyond it 503.
        max_attachments: sessions that one connection may be attached to.
        failed_authentications: bad tokens from one address within `failed_window_s` before they are
            answered `rate_limited`.
        failed_window_s: see `failed_authentications`.
        revocation_poll_s: how often the token file is looked at; live sockets of a revoked token close
            within this time.
        write_buffer: bytes handed to the operating system ahead of the peer before sends wait.
        compression: offer permessage-deflate. Off: it costs memory for every connection, and latency.
    """

    max_payload: int = 1 << 20
    hard_payload: int = 16 << 20
    max_first_frame: int = 64 << 10
    hard_first_frame: int = 128 << 10
    max_buffered: int = 1 << 20
    heartbeat_ms: int = 15_000
    first_frame_timeout_s: float = 10.0
    close_timeout_s: float = 2.0
    max_connections: int = 1024
    max_unauthenticated: int = 64
    max_attachments: int = 64
    failed_authentications: int = 10
    failed_window_s: float = 60.0
    revocation_poll_s: float = 0.5
    write_buffer: int = 32 << 10
    compression: bool = False
