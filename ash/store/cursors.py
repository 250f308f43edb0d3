"""The opaque cursor of a page of sessions. Pure; shared by both stores."""

from __future__ import annotations

import base64
from typing import Annotated

import msgspec

from ash.domain.errors import InvalidRequest
from ash.domain.values import SessionRow

_Position = tuple[Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)], str]


def encode_cursor(last: SessionRow) -> str:
    """The cursor of the page behind the one that ends with `last`."""
    position = msgspec.json.encode((last.updated_at, last.session_id))
    return base64.urlsafe_b64encode(position).decode()


def decode_cursor(cursor: str) -> tuple[int, str]:
    """`updated_at` and `session_id` of the last row of the page before.

    Raises:
        InvalidRequest: `cursor` was not made by `encode_cursor`.
    """
    try:
        position = base64.b64decode(cursor, altchars=b"-_", validate=True)
        updated_at, session_id = msgspec.json.decode(position, type=_Position)
    except ValueError as error:
        raise InvalidRequest(
            f"{cursor!r} is not a cursor of a session list; take nextCursor of the page before, or none"
        ) from error
    return updated_at, session_id


def check_page_limit(limit: int) -> None:
    """Refuse a page of nothing, which would have no cursor to go on from.

    Raises:
        InvalidRequest: `limit` is below 1.
    """
    if limit < 1:
        raise InvalidRequest(f"a page must hold at least one session, not {limit}")
