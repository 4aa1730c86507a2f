from __future__ import annotations

import io

from lowbit_server.jobs.report import MIN_INTERVAL_S, Reporter
from lowbit_server.jobs.spec import JOB_REPORT, Progress, Staged


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sent(stream: io.StringIO) -> list[Progress]:
    reports = [JOB_REPORT.validate_json(line) for line in stream.getvalue().splitlines()]
    return [report for report in reports if isinstance(report, Progress)]


def test_progress_is_bounded_but_phases_and_ends_are_kept() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(stream, clock)
    reporter.phase("quantize", 1000)
    for done in range(1, 1001):
        clock.now += MIN_INTERVAL_S / 10
        reporter.progress(done, done * 7)
    reporter.phase("save")
    reports = sent(stream)
    assert 90 <= len(reports) <= 103
    assert (reports[0].phase, reports[0].done, reports[0].total) == ("quantize", 0, 1000)
    assert (reports[-2].done, reports[-2].bytes) == (1000, 7000)
    assert (reports[-1].phase, reports[-1].total) == ("save", 0)


def test_the_rest_is_estimated_from_the_pace_of_the_phase() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(stream, clock)
    clock.now += 50  # another phase's time does not count
    reporter.phase("quantize", 10)
    clock.now += 4
    reporter.progress(2)
    clock.now += 16
    reporter.progress(10)
    assert [report.eta_s for report in sent(stream)] == [None, 16, 0]


def test_memory_is_reported_and_other_reports_pass() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.phase("save")
    reporter.send(Staged())
    assert sent(stream)[0].peak_memory_bytes > 2**20
    assert stream.getvalue().splitlines()[-1] == '{"kind":"staged"}'
