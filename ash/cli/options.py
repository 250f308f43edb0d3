"""What every command shares: the config option and the console."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

Config = Annotated[Path, typer.Option("--config", help="The config file.", envvar="ASH_CONFIG")]
DEFAULT_CONFIG: Final = Path("config.toml")
out: Final = Console()
