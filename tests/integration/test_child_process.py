"""A real child process: frames both ways, and every way in which it can end."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ash.domain.errors import ChildExited
from ash.ipc import child as child_module
from ash.ipc.child import ChildExit, ChildProcess

HERE = str(Path(__file__).parent)


class Client:
    def __init__(self, module: str = "echoing_child") -> None:
        self.messages: asyncio.Queue[str] = asyncio.Queue()
        self.exits: list[ChildExit] = []
        self.process = ChildProcess[str, str](
            module,
            name="echo",
            payload_type=str,
            on_message=self.messages.put_nowait,
            on_exit=self.exits.append,
            environment={"PYTHONPATH": HERE, "ECHO_VARIABLE": "from outside"},
        )


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    await client.process.start()
    assert await client.messages.get() == "ready"
    yield client
    client.process.kill("the test is over")
    await client.process.wait()
    assert len(client.exits) == 1


async def test_messages_go_both_ways_in_order(client: Client) -> None:
    sent = [str(number) for number in range(500)]
    for text in sent:
        await client.process.send(text)
    assert [await client.messages.get() for _ in sent] == sent


async def test_a_message_larger_than_every_buffer(client: Client) -> None:
    await client.process.send("x" * 3_000_000)
    assert len(await client.messages.get()) == 3_000_000


async def test_the_environment_reaches_the_child(client: Client) -> None:
    client.process.post("variable")
    assert await client.messages.get() == "from outside"


async def test_a_stop_lets_the_child_finish(client: Client) -> None:
    ended = await client.process.stop()
    assert ended is not None
    assert (ended.code, ended.cause) == (0, "")
    assert await client.messages.get() == "bye"
    assert client.process.pid is None
    with pytest.raises(ChildExited, match="not running"):
        client.process.post("too late")


async def test_a_child_that_does_not_leave_is_killed(client: Client) -> None:
    await client.process.send("stay")
    ended = await client.process.stop(timeout_s=0.05)
    assert ended is not None
    assert ended.signal_name == "SIGKILL"
    assert "did not leave within 0.05 s" in ended.describe()


async def test_an_abort_is_described_with_its_last_words(client: Client) -> None:
    await client.process.send("abort")
    ended = await client.process.wait()
    assert ended.describe() == "was ended by SIGABRT (about to abort)"
    assert client.exits == [ended]


async def test_garbage_ends_the_child(client: Client) -> None:
    await client.process.send("garbage")
    ended = await client.process.wait()
    assert "sent what is no message" in ended.describe()


async def test_a_child_that_closes_its_channel_is_not_left_behind(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_EXIT_GRACE_S", 0.05)
    await client.process.send("close")
    assert "closed its channel but still ran" in (await client.process.wait()).describe()


async def test_a_stopped_child_can_be_killed(client: Client) -> None:
    assert client.process.pid is not None
    os.kill(client.process.pid, signal.SIGSTOP)
    client.process.kill("hung")
    assert (await client.process.wait()).describe() == "was ended by SIGKILL (hung)"


async def test_a_failing_callback_does_not_leave_the_child_unsupervised(client: Client) -> None:
    def refuse(message: str) -> None:
        raise ValueError(message)

    client.process._on_message = refuse
    await client.process.send("anything")
    assert "could not be handled: anything" in (await client.process.wait()).describe()


async def test_a_module_that_does_not_exist_exits_with_the_reason() -> None:
    client = Client("no_such_module_anywhere")
    await client.process.start()
    ended = await client.process.wait()
    assert ended.code == 1
    assert "no_such_module_anywhere" in ended.describe()


async def _ended(pid: int) -> None:
    """Return once process `pid` has ended, whoever its parent is (pidfd_open(2))."""
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def test_the_child_dies_with_its_parent() -> None:
    program = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_child_process import Client\n"
        "async def main():\n"
        "    client = Client(); await client.process.start(); await client.messages.get()\n"
        "    await client.process.send('stay'); print(client.process.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    ended = asyncio.create_task(_ended(int(await parent.stdout.readline())))
    await asyncio.sleep(0)  # the watch has begun
    assert not ended.done()
    parent.kill()
    await asyncio.wait_for(ended, 30)
    await parent.wait()
