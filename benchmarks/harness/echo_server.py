"""A bare `websockets` server with the gateway's settings: what a connection costs before Ash does anything.

    python -m benchmarks.harness.echo_server [--compression]

prints its port, and echoes until its standard input is closed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve

from ash.gateway.limits import GatewayLimits
from ash.gateway.ws import MAX_QUEUED_FRAMES


async def echo(socket: ServerConnection) -> None:
    async for frame in socket:
        await socket.send(frame)


async def main(*, compression: bool) -> None:
    limits = GatewayLimits()
    async with serve(
        echo,
        "127.0.0.1",
        0,
        compression="deflate" if compression else None,
        server_header=None,
        open_timeout=limits.first_frame_timeout_s,
        ping_interval=None,
        close_timeout=limits.close_timeout_s,
        max_size=limits.hard_payload,
        max_queue=MAX_QUEUED_FRAMES,
        write_limit=limits.write_buffer,
    ) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compression", action="store_true")
    asyncio.run(main(compression=parser.parse_args().compression))
