"""A client written from docs/protocol.md alone: python docs/example_client.py TOKEN "a question"."""

import asyncio
import json
import sys

from websockets.asyncio.client import ClientConnection, connect

ADDRESS = "ws://127.0.0.1:8765/ws"


async def call(socket: ClientConnection, number: int, method: str, **params: object) -> dict:
    """Send one request and return its result; notifications before the answer are passed over."""
    await socket.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}))
    while True:
        frame = json.loads(await socket.recv())
        if "error" in frame:
            raise SystemExit(f"{method}: {frame['error']['message']}")
        if frame.get("id") == number:
            return frame["result"]


async def main(token: str, question: str) -> None:
    async with connect(ADDRESS, subprotocols=["ash.v1"]) as socket:
        await call(socket, 1, "initialize", protocolVersion=1, client={"name": "example"}, token=token)
        session = (await call(socket, 2, "session/new", title="example"))["sessionId"]
        prompt = [{"type": "text", "text": question}]
        run = (await call(socket, 3, "session/prompt", sessionId=session, prompt=prompt))["runId"]
        # The run belongs to the session: attaching after its start replays what it has said so far.
        await call(socket, 4, "session/attach", sessionId=session, afterSeq=0)
        async for text in socket:
            frame = json.loads(text)
            if frame.get("method") != "session/event" or frame["params"]["runId"] != run:
                continue
            event = frame["params"]["event"]
            if event["type"] == "TEXT_MESSAGE_CONTENT":
                print(event["delta"], end="", flush=True)
            elif event["type"] == "RUN_ERROR":
                raise SystemExit(f"\n{event['code']}: {event['message']}")
            elif event["type"] == "RUN_FINISHED":
                print()
                return


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit('usage: python docs/example_client.py TOKEN "a question"')
    asyncio.run(main(sys.argv[1], sys.argv[2]))
