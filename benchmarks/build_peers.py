"""Build the peers that peers.py measures against, from the sources that llama-cpp-python vendors.

Below --folder: the source archive, `build/bin/llama-server` and `llama-batched-bench`, and a virtual
environment `venv` for llama-cpp-python's packaged server, which uses the compiled library that Ash uses.
Takes about 20 minutes on two cores, once; what is there already is kept.

    .venv/bin/python -m benchmarks.build_peers [--folder build/peers]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path

from benchmarks.harness.llama_cpp_peers import PeerPrograms
from benchmarks.harness.server import ROOT

DEFAULT_FOLDER = ROOT / "build" / "peers"
TARGETS = ("llama-server", "llama-batched-bench")
SERVER_PACKAGES = (
    "uvicorn>=0.22.0",
    "fastapi>=0.100.0",
    "pydantic-settings>=2.0.1",
    "sse-starlette>=1.6.1",
    "starlette-context>=0.3.6,<0.4",
    "PyYAML>=5.1",
)
"""The extra `server` of llama-cpp-python 0.3.36."""


def run(*command: str | Path) -> None:
    """Run a command and show what it prints; its failure ends this program."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def download(folder: Path) -> Path:
    """The unpacked sources of the installed version of llama-cpp-python."""
    version = metadata.version("llama-cpp-python")
    sources = folder / f"llama_cpp_python-{version}"
    if not sources.is_dir():
        archive = folder / f"{sources.name}.tar.gz"
        if not archive.is_file():
            requirement = f"llama-cpp-python=={version}"
            options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder)
            run(sys.executable, "-m", "pip", "download", *options, requirement)
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return sources


def compile_programs(sources: Path, folder: Path) -> None:
    """llama-server and llama-batched-bench, optimised for this processor."""
    build = folder / "build"
    if not (build / "CMakeCache.txt").is_file():
        options = ("-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_CURL=OFF")
        run("cmake", "-S", sources / "vendor" / "llama.cpp", "-B", build, *options)
    jobs = str(os.cpu_count() or 1)
    run("cmake", "--build", build, "--config", "Release", "--parallel", jobs, "--target", *TARGETS)


def packaged_server(programs: PeerPrograms) -> None:
    """An environment for `python -m llama_cpp.server`, apart from the project's own."""
    environment = programs.python.parents[1]
    if not programs.python.exists():
        run(sys.executable, "-m", "venv", environment)
    run(programs.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *SERVER_PACKAGES)
    # llama_cpp itself is looked up behind what was just installed: compiling it again would take minutes,
    # and a peer with another build of the library would be no peer.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    programs = PeerPrograms(folder)
    if not (programs.llama_server.exists() and programs.batched_bench.exists()):
        compile_programs(download(folder), folder)
    packaged_server(programs)
    if missing := programs.missing():
        sys.exit(f"build_peers: still missing: {', '.join(map(str, missing))}")
    print(f"peers are ready in {folder}")


if __name__ == "__main__":
    main()
