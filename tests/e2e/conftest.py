"""One real server with the bundled slices for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

ROOT = Path(__file__).resolve().parents[2]


class RunningServer(Struct):
    """`ash serve` as a child process. `ws`, `chat` and `http` are its addresses."""

    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[str]
    ws: str
    chat: str
    http: str

    @property
    def token(self) -> str:
        return (self.folder / "owner.token").read_text().strip()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    environment = {
        **os.environ,
        "ASH_STORE__PATH": str(folder),
        "ASH_GATEWAY__PORT": "0",
        "ASH_GATEWAY__HTTP_PORT": "0",
    }
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "ash", "serve", "--config", str(ROOT / "config.toml")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if "chat with it" in line:
                break
        else:
            pytest.fail((folder / "stderr.txt").read_text())
        facts = json.loads((folder / "server.json").read_text())
        yield RunningServer(folder, environment, process, facts["ws"], facts["chat"], facts["http"])
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
    assert process.returncode == 0, "a server that is told to stop ends with status 0"
    assert "Traceback" not in (folder / "stderr.txt").read_text()
