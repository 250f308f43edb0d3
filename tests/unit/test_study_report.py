"""From logs to figures, sentences, plots and a page."""

from __future__ import annotations

import csv
import io
import itertools
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import msgspec
import pytest
from rich.console import Console

from ash.cli.timeline import timeline
from ash.domain.events import Record
from ash.modes.filter import ModeFilter
from ash.session.modes import ModeTracker
from ash.study.analysis import StudiedSession, analyse
from ash.study.conclusions import conclusions
from ash.study.plan import Cue, Plan, input_key, schedule
from ash.study.plots import intervals, ribbons
from ash.study.progress import FinishedSession, Provenance, StudyRecord
from ash.study.report import html_report
from ash.study.result_tables import (
    SHIFT_COLUMNS,
    column_types,
    conditions_table,
    sessions_table,
    shifts_table,
)
from ash.study.statistics import UNKNOWN, Interval
from ash.study.stitching import detected_again, stitch
from ash.study.tables import csv_text
from ash.study.transcript import SessionView, view
from tests.study_logs import LogBuilder, shifting_session

PLAN = Plan(
    name="<trial>",
    seeds=(1, 2),
    turns=9,
    openings=("Explain tries.",),
    conditions=("autonomous", "cued"),
    cues=(Cue("Write a <poem> & song.", "creative"),),
    cue_turns=(5,),
)


def studied(condition: str, seed: int, *, shifts: bool) -> StudiedSession:
    """A session by the plan; its shift begins with the answer to turn 5, the alarm comes two later."""
    log = LogBuilder(f"ses_{condition}_{seed}")
    starts = []
    for step in schedule(PLAN, condition, seed):
        mode = "creative" if shifts and step.turn >= 5 else "analytic"
        key = input_key(PLAN, condition, seed, step)
        starts.append(log.turn(step.text, f"answer {step.turn}", mode, key=key))
    if shifts:
        trigger = "external" if condition == "cued" else "self_directed"
        log.shift("analytic", "creative", onset=starts[5], alarm=starts[7], trigger=trigger)
    session = view(log.session_id, log.records)
    return StudiedSession(condition, seed, session, [[1.0, 0.0], [0.0, 1.0]] * 5)


def sessions() -> list[StudiedSession]:
    return [
        studied("autonomous", 1, shifts=True),
        studied("autonomous", 2, shifts=False),
        studied("cued", 1, shifts=True),
        studied("cued", 2, shifts=True),
    ]


def test_figures_of_a_study_worked_by_hand() -> None:
    result = analyse(PLAN, sessions(), [1.0, 0.0])
    autonomous, cued = result.conditions
    assert (autonomous.sessions, autonomous.answers, autonomous.shifts) == (2, 20, 1)
    assert autonomous.per_100.estimate == 5.0
    assert autonomous.self_directed_per_100.estimate == 5.0
    assert cued.per_100.estimate == 10.0
    assert cued.self_directed_per_100.estimate == 0.0
    assert cued.self_directed_per_100.high == pytest.approx(3.689 / 0.2, rel=1e-3)
    assert (autonomous.delay, cued.delay) == (2, 2)
    assert autonomous.confusion == {("none", "self_directed"): 1}
    assert cued.confusion == {("cue", "external"): 2}
    assert (autonomous.events, cued.events, cued.events_followed.estimate) == (0, 2, 1.0)
    assert autonomous.difference is None
    assert cued.difference is not None
    assert (cued.difference.estimate, cued.difference.low < 0) == (5.0, True)
    assert autonomous.shares["creative"].estimate == 0.25
    assert autonomous.persona_distance.estimate == 0.5
    assert autonomous.line_to_line.estimate == 0.0


def test_sentences_say_what_the_intervals_bear() -> None:
    said = " ".join(conclusions(analyse(PLAN, sessions(), None).conditions))
    assert "cued: no self-directed shift in 20 answers of 2 sessions. That does not show" in said
    assert "does not tell the two apart" in said
    assert "disagrees with the plan in 0 of 3 shifts" in said


def test_a_cue_for_another_mode_is_not_the_cause() -> None:
    log = LogBuilder("ses_x")
    starts = [
        log.turn(step.text, "x", "analytic", key=input_key(PLAN, "cued", 1, step))
        for step in schedule(PLAN, "cued", 1)
    ]
    log.shift("analytic", "conversational", onset=starts[5], alarm=starts[7])
    (shift,) = analyse(PLAN, [StudiedSession("cued", 1, view("ses_x", log.records))], None).shifts
    assert (shift.cause, shift.after_event) == ("none", True)


def test_an_opening_may_set_off_a_shift_too() -> None:
    log = LogBuilder("ses_x")
    starts = [
        log.turn(step.text, "x", "analytic", key=input_key(PLAN, "autonomous", 1, step))
        for step in schedule(PLAN, "autonomous", 1)
    ]
    log.shift("conversational", "analytic", onset=starts[1], alarm=starts[3], trigger="external")
    session = StudiedSession("autonomous", 1, view("ses_x", log.records))
    (shift,) = analyse(PLAN, [session], None).shifts
    assert shift.cause == "opening"


class Page(HTMLParser):
    """Collects what a page loads and says."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in {"src", "href"}]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_escapes_what_it_quotes() -> None:
    found = sessions()
    record = StudyRecord(
        PLAN,
        PLAN.digest,
        Provenance({"ash": "0.1"}, {}, {"nano": "0123abcd"}, "minilm", {"cores": 2}),
        tuple(FinishedSession(each.condition, each.seed, each.view.session_id, 1, 2) for each in found),
    )
    html = html_report(record, analyse(PLAN, found, None), found)
    page = Page()
    page.feed(html)
    assert page.links == []
    assert "<trial>" not in html
    text = " ".join(page.text)
    for needed in ("<trial>", "0123abcd", "minilm", "1, 2", "self-directed", PLAN.digest):
        assert needed in text
    # The answers of these sessions are `answer N`; the page numbers answers, and quotes none.
    assert "answer 3" not in html.replace("answer 3, 20", "")


def test_ribbons_show_every_answer_every_event_and_every_shift() -> None:
    found = sessions()
    svg = ET.fromstring(ribbons(PLAN, found, analyse(PLAN, found, None).shifts))
    names = [element.get("class") for element in svg.iter()]
    assert names.count("analytic") == 5 + 10 + 5 + 5
    assert names.count("creative") == 15
    assert (names.count("cue"), names.count("shift"), names.count("slice0")) == (2, 3, 40)
    titles = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert any("trigger external; by the plan: cue" in title for title in titles)


def test_intervals_are_drawn_inside_the_picture_and_unknown_ones_are_said() -> None:
    rows = [("a", Interval(1.0, -2.0, 3.0)), ("b", UNKNOWN), ("c", Interval(0.0, 0.0, 9.0, "widened"))]
    svg = ET.fromstring(intervals(rows, "title", "unit"))
    width = float(svg.get("width", "0"))
    places = [
        float(value)
        for element in svg.iter()
        for name in ("x1", "x2", "cx")
        if (value := element.get(name)) is not None
    ]
    assert min(places) >= 0
    assert max(places) <= width
    text = " ".join(element.text or "" for element in svg.iter())
    assert "nothing to estimate from" in text
    assert "0.00 (0.00 to 9.00) w" in text


def test_tables_have_the_same_columns_in_every_row() -> None:
    result = analyse(PLAN, sessions(), None)
    for rows in (
        sessions_table(result.sessions),
        conditions_table(result.conditions),
        shifts_table(result.shifts),
    ):
        types = column_types(rows)
        assert all(set(row) == set(types) for row in rows)
        assert len(list(csv.DictReader(io.StringIO(csv_text(rows, types), newline="")))) == len(rows)
    assert column_types(conditions_table(result.conditions))["per_100_low"] is float
    assert column_types(shifts_table(result.shifts)) == {
        name: SHIFT_COLUMNS[name] for name in shifts_table(result.shifts)[0]
    }
    assert len(SHIFT_COLUMNS) == len(shifts_table(result.shifts)[0])


def test_a_study_without_answers_says_so() -> None:
    session = StudiedSession("autonomous", 1, SessionView("ses_1"))
    result = analyse(PLAN, [session], None)
    assert conclusions(result.conditions) == ["autonomous: no answers, so nothing can be said."]
    assert ET.fromstring(ribbons(PLAN, [session], ())) is not None


# -- modes found anew --------------------------------------------------------------------------------------


def logged_by_the_filter() -> list[Record]:
    """A session whose modes and shifts are those of the filter: ten analytic answers, then ten creative."""
    log = LogBuilder()
    for number in range(20):
        log.turn("Go on.", f"answer {number}", "analytic" if number < 10 else "creative")
    return detected_again(log.records, ModeTracker(ModeFilter()))


def test_a_whole_session_that_is_observed_again_has_the_same_shifts() -> None:
    first = logged_by_the_filter()
    again = detected_again(first, ModeTracker(ModeFilter()))
    assert again == first
    (shift,) = view("ses_1", again).shifts
    assert shift.value.to == "creative"
    assert view("ses_1", again).answers[10].seq == shift.value.onset_seq


def test_turns_without_memory_become_one_session() -> None:
    whole = logged_by_the_filter()
    answers = view("ses_1", whole).turns
    fork_seq = answers[1].seq - 1
    bounds = [turn.seq for turn in answers[1:]] + [whole[-1].seq + 1]
    # Each copy begins with the opening and goes on with one turn, at seqs of its own.
    copies = []
    for start, end in itertools.pairwise(bounds):
        part = [record for record in whole if start <= record.seq < end]
        copies.append(
            [
                *(record for record in whole if record.seq <= fork_seq),
                *(
                    msgspec.structs.replace(record, session_id="copy", seq=fork_seq + 1 + number)
                    for number, record in enumerate(part)
                ),
            ]
        )
    opening = [record for record in whole if record.seq <= fork_seq]
    stitched = stitch(opening, copies, fork_seq, ModeTracker(ModeFilter()))
    assert stitched == whole


# -- the timeline ------------------------------------------------------------------------------------------


def drawn(session: SessionView, width: int, *, terminal: bool = False) -> str:
    console = Console(
        width=width,
        file=io.StringIO(),
        force_terminal=terminal,
        color_system="standard" if terminal else None,
    )
    console.print(timeline(session, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_timeline_shows_time_origin_ribbon_route_and_shift() -> None:
    text = drawn(view("ses_1", shifting_session().records), 100)
    assert "AAA|CCC" in text
    assert " user     A nano A trie stores keys by prefix." in text
    assert "shift analytic -> creative country since" in text
    assert "self_directed" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [20, 30, 45, 59, 60, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    session = view("ses_1", shifting_session().records)
    lines = drawn(session, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line[2:3] == ":" for line in lines) == len(session.turns)


def test_a_terminal_gets_colour() -> None:
    assert "\x1b[" in drawn(view("ses_1", shifting_session().records), 80, terminal=True)


def test_empty_sessions_and_tool_calls_have_a_timeline() -> None:
    assert "no turns" in drawn(view("ses_1", []), 80)
    log = LogBuilder()
    log.tool("c1", "search", "{}", "found")
    assert "1 tool calls" in drawn(view("ses_1", log.records), 80)
