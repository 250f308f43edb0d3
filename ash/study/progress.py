"""What a study has done so far and all that is needed to run it again, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ash.domain.errors import StudyError
from ash.study.files import replacing
from ash.study.plan import Plan

STUDY_FILE = "study.json"


class Provenance(Struct, frozen=True):
    """Everything besides the plan that a result depends on.

    Attributes:
        versions: of Ash, of Python and of the packages that compute.
        config: the settings that the server ran with.
        weights: by slice, the SHA-256 of its model file; `None` where it has none on this machine.
        encoder: its identity (name and content hash).
        machine: system, processor, usable cores.
    """

    versions: dict[str, str]
    config: dict[str, Any]
    weights: dict[str, str | None]
    encoder: str
    machine: dict[str, Any]


class FinishedSession(Struct, frozen=True):
    """One session of a study.

    Attributes:
        condition, seed: which one it is.
        session_id: in the study's own log.
        continuations: of the condition no_memory, the forks that hold one turn each, in order.
        fork_seq: the seq of `session_id` behind which they go on.
        started_at, finished_at: milliseconds since the Unix epoch.
    """

    condition: str
    seed: int
    session_id: str
    started_at: int
    finished_at: int
    continuations: tuple[str, ...] = ()
    fork_seq: int | None = None


class StudyRecord(Struct, frozen=True):
    """The content of the study file. A session that was cut off is not in it and is run again."""

    plan: Plan
    plan_digest: str
    provenance: Provenance
    finished: tuple[FinishedSession, ...] = ()

    def missing(self) -> list[tuple[str, int]]:
        """(condition, seed) of every session that is not finished, seed by seed."""
        done = {(session.condition, session.seed) for session in self.finished}
        return [
            (condition, seed)
            for seed in self.plan.seeds
            for condition in self.plan.conditions
            if (condition, seed) not in done
        ]

    def with_session(self, session: FinishedSession) -> StudyRecord:
        """The record after one more session."""
        return msgspec.structs.replace(self, finished=(*self.finished, session))


def load_record(folder: Path) -> StudyRecord | None:
    """The record in `folder`; None if no study was begun there.

    Raises:
        StudyError: the file cannot be read.
    """
    path = folder / STUDY_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=StudyRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise StudyError(f"{path} cannot be read: {error}; move it away to begin the study anew") from error


def save_record(record: StudyRecord, folder: Path) -> None:
    """Write the record, whole or not at all.

    Raises:
        StudyError: it cannot be written.
    """
    with replacing([folder / STUDY_FILE], force=True) as (file,):
        file.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))


def begin_or_resume(plan: Plan, provenance: Provenance, folder: Path) -> StudyRecord:
    """The record to go on with: a new one, or that of the same study.

    Raises:
        StudyError: `folder` holds another plan's study, or weights or versions have changed since it began.
    """
    record = load_record(folder)
    if record is None or not record.finished:
        record = StudyRecord(plan, plan.digest, provenance)
        save_record(record, folder)
        return record
    if record.plan_digest != plan.digest:
        raise StudyError(
            f"{folder} holds a study with another plan ({record.plan.name}); undo the change, or choose "
            "another folder with --out"
        )
    for name in ("weights", "encoder", "config", "versions"):
        if getattr(record.provenance, name) != getattr(provenance, name):
            raise StudyError(
                f"{folder}: the {name} are not those with which the study began; its sessions would not be "
                "comparable. Restore them, or begin anew with another --out"
            )
    return record
