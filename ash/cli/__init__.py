"""The command line: arguments and rendering only."""

from __future__ import annotations

import sys

from ash.cli.commands import app
from ash.domain.errors import AshError


def main() -> None:
    """Run the command; a deliberate error is one line on stderr and exit status 1."""
    try:
        app()
    except AshError as error:
        sys.stderr.write(f"ash: {error}\n")
        sys.exit(1)
