"""`ash token`: access tokens."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Table

from ash.app import prepare_data_folder
from ash.cli.client import local_token
from ash.cli.options import DEFAULT_CONFIG, Config, out
from ash.config import load
from ash.domain.values import Role
from ash.gateway.tokens import TokenRegistry

token_app = typer.Typer(help="Access tokens.", no_args_is_help=True)


@token_app.command("show")
def token_show(config: Config = DEFAULT_CONFIG) -> None:
    """Print the owner's token. Example: websocat -H "Authorization: Bearer $(ash token show)" ..."""
    sys.stdout.write(local_token(load(config).data_folder) + "\n")


@token_app.command("new")
def token_new(
    name: str,
    role: Annotated[Role, typer.Option(help="What the token may do.")] = Role.MEMBER,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Make a token and print it once. Example: ash token new laptop --role member."""
    folder = prepare_data_folder(load(config))
    sys.stdout.write(TokenRegistry(folder).issue(name, role) + "\n")


@token_app.command("list")
def token_list(config: Config = DEFAULT_CONFIG) -> None:
    """List the tokens; their secrets are not kept."""
    table = Table("id", "name", "role", "active")
    for record in TokenRegistry(load(config).data_folder).list():
        table.add_row(record.id, record.name, record.role, "yes" if record.active else "revoked")
    out.print(table)


@token_app.command("revoke")
def token_revoke(name: str, config: Config = DEFAULT_CONFIG) -> None:
    """Revoke a token by id or name; its live connections close within a second."""
    revoked = TokenRegistry(load(config).data_folder).revoke(name)
    out.print(f"revoked {len(revoked)}")
