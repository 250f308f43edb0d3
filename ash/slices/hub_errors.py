"""Failures of the Hugging Face Hub, each said in words of the user: what it means and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ash.domain.errors import ModelFileError
from ash.slices.models import HubReference


@contextmanager
def named_errors(reference: HubReference, *, endpoint: str, folder: Path) -> Iterator[None]:
    """Raise what happens inside as ModelFileError.

    Args:
        reference: what is asked for.
        endpoint: the Hub that is asked.
        folder: the cache that is written.

    Raises:
        ModelFileError: for every failure of the Hub, the network or the disk.
    """
    repository = reference.repository
    page = f"{endpoint}/{repository}"
    try:
        yield
    except Exception as error:
        message = _meaning(error, reference, endpoint=endpoint, page=page, folder=folder)
        if message is None:
            raise
        raise ModelFileError(message) from error


def _meaning(  # noqa: C901, PLR0911 - one case for each kind of failure
    error: Exception, reference: HubReference, *, endpoint: str, page: str, folder: Path
) -> str | None:
    """What `error` means; None for one that is none of the Hub's. Classes that contain others come later."""
    repository = reference.repository
    match error:
        case ModelFileError():
            return None
        case OfflineModeIsEnabled():
            return f"{reference} cannot be fetched while HF_HUB_OFFLINE is set; unset it for this command"
        case GatedRepoError():
            return (
                f"{repository} is gated: sign in at {page} and accept its conditions, make a token with read "
                f"access at {endpoint}/settings/tokens, and run this again with HF_TOKEN set to it"
            )
        case RevisionNotFoundError():
            return (
                f"{repository} has no revision {reference.revision!r}; see {page}/tree/main for what there is"
            )
        case RepositoryNotFoundError():
            return (
                f"there is no repository {repository} on {endpoint}; check its name, and if it is private, "
                "set HF_TOKEN to a token that may read it"
            )
        case RemoteEntryNotFoundError():
            return f"{reference.file} is no longer in {repository}; run this again"
        case HfHubHTTPError(response=response) if response.status_code in {401, 403}:
            return f"{endpoint} refuses access to {repository} (HTTP {response.status_code}); check HF_TOKEN"
        case HfHubHTTPError(response=response):
            return (
                f"{endpoint} answered with HTTP {response.status_code}; run this again later, it goes on "
                "where it stopped"
            )
        case httpx2.HTTPError() | LocalEntryNotFoundError():
            return (
                f"{endpoint} cannot be reached ({_first_line(error)}); check the network and run this "
                "again, it goes on where it stopped"
            )
        case HFValidationError():
            return f"{repository} is no name of a repository: {_first_line(error)}"
        case OSError():
            return (
                f"{folder} cannot be written: {error.strerror or error}; free some space or set HF_HOME to "
                "another folder, and run this again, it goes on where it stopped"
            )
        case ValueError() | KeyError() | TypeError() | AttributeError():
            # huggingface_hub takes for granted that the answer has the form it expects.
            return (
                f"{endpoint} does not answer as a Hub does ({type(error).__name__}: {_first_line(error)}); "
                "is HF_ENDPOINT right, or does a sign-in page of the network answer instead?"
            )
        case _:
            return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
