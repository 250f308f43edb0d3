"""A small Hugging Face Hub: what a download asks for, with a CDN behind it and faults on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_a_test"


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class StandInHub:
    """One repository, `org/model`, with the branch `main` and the commit COMMIT.

    Attributes:
        files: content by name.
        stated: digests that the Hub states, where they are not those of the content; None: not in LFS.
        cut_after: bytes of each coming answer of the CDN after which the connection is reset.
        fails: so many coming answers of the CDN are errors 500.
        ignores_range: the CDN always sends the whole file.
        stall_after: the CDN sends so many bytes and then waits for `go_on`.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    stated: dict[str, str | None] = field(default_factory=dict)
    card: dict[str, object] = field(default_factory=lambda: {"license": "apache-2.0"})
    tags: list[str] = field(default_factory=list)
    gated: bool = False
    api_status: int = 200
    api_body: str | None = None
    cut_after: list[int] = field(default_factory=list)
    fails: int = 0
    ignores_range: bool = False
    extra: bytes = b""
    stall_after: int | None = None
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    endpoint: str = ""
    cdn: str = ""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request to the CDN."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """Where each request went (api, resolve, cdn) and with which Authorization."""

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/api/models/{org}/{name}", self._info)
        application.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
        application.router.add_get("/{org}/{name}/resolve/{commit}/{file:.+}", self._resolve)
        application.router.add_get("/cdn/{file:.+}", self._content)
        return application

    def _note(self, where: str, request: web.Request) -> None:
        self.tokens.append((where, request.headers.get("Authorization")))

    def _digest(self, name: str) -> str | None:
        return self.stated.get(name, sha256(self.files[name]))

    async def _info(self, request: web.Request) -> web.Response:
        self._note("api", request)
        if self.api_body is not None:
            return web.Response(text=self.api_body, content_type="text/html")
        if self.api_status != 200:
            return web.Response(status=self.api_status)
        if request.match_info["org"] != "org" or request.match_info["name"] != "model":
            return web.json_response({"error": "x"}, status=401, headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info.get("revision", "main") not in {"main", "v1", "refs/pr/1", COMMIT}:
            return web.json_response({"error": "x"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings: list[dict[str, object]] = [{"rfilename": "README.md", "size": 3, "blobId": "1" * 40}]
        for name, body in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(body), "blobId": "2" * 40}
            if (digest := self._digest(name)) is not None:
                entry["lfs"] = {"size": len(body), "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        return web.json_response(
            {
                "id": "org/model",
                "sha": COMMIT,
                "siblings": siblings,
                "cardData": self.card,
                "tags": self.tags,
                "gated": "manual" if self.gated else False,
            }
        )

    async def _resolve(self, request: web.Request) -> web.Response:
        self._note("resolve", request)
        name = request.match_info["file"]
        if self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.Response(status=401, headers={"X-Error-Code": "GatedRepo"})
        if name not in self.files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        etag = self._digest(name) or hashlib.sha1(self.files[name]).hexdigest()
        return web.Response(
            status=302,
            headers={
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(len(self.files[name])),
                "Location": f"{self.cdn}/cdn/{name}",
            },
        )

    async def _content(self, request: web.Request) -> web.StreamResponse:
        self._note("cdn", request)
        self.ranges.append(request.headers.get("Range"))
        if self.fails:
            self.fails -= 1
            return web.Response(status=500)
        body = self.files[request.match_info["file"]] + self.extra
        start = 0
        response = web.StreamResponse()
        if (wanted := request.headers.get("Range")) is not None and not self.ignores_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            response = web.StreamResponse(
                status=206, headers={"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            )
        response.content_length = len(body) - start
        await response.prepare(request)
        if self.cut_after:
            await response.write(body[start : start + self.cut_after.pop(0)])
            assert request.transport is not None
            request.transport.close()
            return response
        if self.stall_after is not None:
            await response.write(body[start : start + self.stall_after])
            start += self.stall_after
            self.stalled.set()
            await self.go_on.wait()
        with contextlib.suppress(ConnectionResetError):  # the client may be gone by then
            await response.write(body[start:])
        return response


@asynccontextmanager
async def serving(hub: StandInHub) -> AsyncIterator[StandInHub]:
    """Run it on a free port; the CDN is the same server under another name, as another origin."""
    # What a client that was killed left open is not waited for.
    runner = web.AppRunner(hub.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    hub.endpoint, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        await runner.cleanup()
