"""`ash slices pull`: fetch a model file from the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ash.cli.options import out
from ash.domain.errors import ModelFileError
from ash.slices.gguf import GgufHeader, read_header
from ash.slices.models import HubReference

if TYPE_CHECKING:
    from ash.slices.pull import HubFile, Offer, Pulled

_CONTEXT: Final = 4096
"""Tokens proposed for a session; memory for the KV cache grows with them, whatever the model could take."""


def slices_pull(
    reference: Annotated[str, typer.Argument(metavar="hf:ORG/REPO/FILE.gguf", help="The file to fetch.")],
    *,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit; default: main.")] = None,
    sha256: Annotated[str | None, typer.Option(help="The digest that the file has to have, hex.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the download.")] = False,
) -> None:
    """Fetch a model file into the Hugging Face cache, check it, and show its table for config.toml.

    A download that breaks off is continued by the same command. Of a model in several files all are fetched.
    HF_TOKEN is used for gated repositories, HF_HOME says where the cache is.

    Example: ash slices pull hf:unsloth/gemma-4-E2B-it-GGUF/gemma-4-E2B-it-Q4_K_M.gguf
    """
    # The client of the Hub takes a third of a second to import; the other commands do not need it.
    from ash.slices.pull import HubCache

    # Its warnings would break the progress bar; failures have messages of their own.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    wanted = _parse(reference, revision)
    cache = HubCache()
    offer = cache.look_up(wanted, sha256=sha256)
    _show(offer)
    if offer.missing_bytes and not yes:
        typer.confirm("Download?", abort=True)
    with _progress_bar() as progress:
        pulled = cache.download(offer, progress=progress, sha256=sha256)
    checked = "as the Hub or you stated" if pulled.verified else "nobody stated one to compare with"
    out.print(f"{pulled.path}\nsha256 {pulled.sha256}, {checked}", soft_wrap=True, markup=False)
    out.print("\nFor config.toml:\n", markup=False)
    out.print(config_table(offer.reference, read_header(pulled.path), pulled), soft_wrap=True, markup=False)


def config_table(reference: HubReference, header: GgufHeader, pulled: Pulled) -> str:
    """The table of config.toml for a file that was fetched; `tier` is left to the user."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", PurePosixPath(reference.file).stem)
    # No hyphens: the name has to fit into a variable of the environment, ASH_SLICES__NAME__KEY.
    name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_") or "model"
    trained = header.context_length
    lines = [
        f"[slices.{name}]",
        'tier = ""  # yours to choose: "nano" for light work, "turbo" for hard work',
        f"model = {json.dumps(str(reference))}",
        f'sha256 = "{pulled.sha256}"',
        f"context = {min(_CONTEXT, trained or _CONTEXT)}  # tokens per session; "
        + (f"the model was trained for {trained}" if trained else "the file does not say what it can take"),
    ]
    if "tokenizer.chat_template" not in header.metadata:
        lines.append('template = "completion"  # the file has no chat template: a base model')
    return "\n".join(lines)


def _parse(reference: str, revision: str | None) -> HubReference:
    scheme, _, rest = reference.partition(":")
    if scheme != "hf":
        raise ModelFileError(f"{reference!r} cannot be fetched; write hf:ORG/REPO/FILE.gguf")
    wanted = HubReference.parse(rest)
    if revision is None:
        return wanted
    if wanted.revision is not None:
        raise ModelFileError(f"{reference} names a revision already; leave out --revision")
    return HubReference(wanted.repository, wanted.file, revision)


def _show(offer: Offer) -> None:
    """What is going to be downloaded, and under which licence."""
    out.print(f"repository {offer.page}, commit {offer.commit[:12]}", soft_wrap=True, markup=False)
    for file in offer.files:
        out.print(f"  {file.name}, {file.size / 1e6:,.0f} MB", soft_wrap=True, markup=False)
    licence = offer.licence or "not stated: look at the repository's page before you use the model"
    address = f" ({offer.licence_url})" if offer.licence_url else ""
    out.print(f"licence {licence}{address}", soft_wrap=True, markup=False)
    if offer.gated:
        out.print("The repository is gated: you have accepted its conditions.", markup=False)
    here = (
        "all of it is here" if not offer.missing_bytes else f"{offer.missing_bytes / 1e6:,.0f} MB to download"
    )
    out.print(here, markup=False)


@contextmanager
def _progress_bar() -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        yield _Bars(progress)


class _Bars:
    """One bar for each file."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, file: HubFile, present: int) -> None:
        if file.name not in self._tasks:
            description = escape(PurePosixPath(file.name).name)
            # What is here already says nothing of the speed.
            self._tasks[file.name] = self._progress.add_task(description, total=file.size, completed=present)
        self._progress.update(self._tasks[file.name], completed=present)
