"""An imported session can be read, forked and deleted, and takes nothing in."""

from __future__ import annotations

import pytest

from ash.domain.errors import Forbidden, NotFound
from ash.study.importing import imported
from tests.integration.test_session_service import OWNER, World
from tests.study_logs import shifting_session


async def test_an_imported_session_takes_no_input_and_its_fork_does() -> None:
    world = World()
    await world.store.open()
    await world.encoder.open()
    for timed in imported(shifting_session().records, "ses_9"):
        await world.store.append("ses_9", [timed.draft])
    with pytest.raises(Forbidden, match="read-only; fork it"):
        await world.prompt("ses_9")
    with pytest.raises(Forbidden, match="read-only"):
        await world.service.add_goal(OWNER, "ses_9", "change it")
    assert (await world.follow("ses_9")).head_seq > 0
    copy = await world.service.fork(OWNER, "ses_9", None)
    run_id, disposition = await world.prompt(copy)
    assert disposition == "started"
    await world.until(copy, run_id, "RUN_FINISHED")
    await world.service.delete(OWNER, "ses_9")
    with pytest.raises(NotFound):
        await world.prompt("ses_9")
    await world.service.stop()
