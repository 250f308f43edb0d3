"""The demo is the end-to-end test: eight prompts, both slices, a killed server, a killed worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slices
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_ends_with_ok() -> None:
    demo = Path(__file__).with_name("demo.py")
    result = subprocess.run([sys.executable, str(demo)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "demo: ok"
