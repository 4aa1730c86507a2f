from __future__ import annotations

from lowbit_server.engine.request import Finish, Output, Request
from lowbit_server.engine.roster import Roster

CONTEXT = 10


def request(number: int, *, prompt: int = 2, ends_by: float = float("inf"), n: int = 1) -> Request:
    return Request(
        id=number,
        prompt=(1,) * prompt,
        max_tokens=2,
        submitted_at=1.0,
        ends_by=ends_by,
        n=n,
    )


def admit_all(roster: Roster, now: float = 1.0) -> list[int]:
    admitted = []
    while group := roster.admit(now, lambda _: True):
        admitted.append(group[0].request.id)
    return admitted


def test_slots_are_given_in_order_of_arrival() -> None:
    roster = Roster(max_running=2)
    for number in (3, 1, 2):
        assert roster.submit(request(number), CONTEXT) == []
    assert admit_all(roster) == [3, 1]
    assert roster.waiting == 1


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    roster = Roster(max_running=2)
    for prompt in (9, 1):
        roster.submit(request(prompt, prompt=prompt), CONTEXT)
    assert roster.admit(1.0, lambda group: len(group[0].request.prompt) < 5) == []
    assert roster.waiting == 2


def test_queue_time_comes_with_the_first_token_only() -> None:
    roster = Roster(max_running=1)
    roster.submit(request(1), CONTEXT)
    (running,) = roster.admit(1.25, lambda _: True)
    assert roster.extend(running, 7, 2.0) == Output(1, (7,), queue_us=250_000)
    assert roster.extend(running, 8, 2.0) == Output(1, (8,), Finish.MAX_TOKENS)
    assert roster.running == []


def test_what_cannot_run_ends_at_once() -> None:
    roster = Roster(max_running=1)
    assert roster.submit(request(1, prompt=10), CONTEXT) == [Output(1, finish=Finish.CONTEXT_LIMIT)]
    assert roster.submit(request(2, prompt=0), CONTEXT)[0].error
    assert roster.waiting == 0


def test_time_is_up_in_a_slot_and_in_the_queue() -> None:
    roster = Roster(max_running=1)
    for number in (1, 2, 3):
        roster.submit(request(number, ends_by=5.0 if number < 3 else 9.0), CONTEXT)
    admit_all(roster)
    ended = [Output(1, finish=Finish.TIME_LIMIT), Output(2, finish=Finish.TIME_LIMIT)]
    assert roster.expire(4.9) == []
    assert roster.expire(5.0) == ended
    assert admit_all(roster) == [3]


def test_cancel_ends_a_request_once() -> None:
    roster = Roster(max_running=1)
    for number in (1, 2, 3):
        roster.submit(request(number), CONTEXT)
    admit_all(roster)
    assert roster.cancel(2) == [Output(2, finish=Finish.CANCELLED)]
    assert roster.cancel(2) == []
    assert [output.request for output in roster.cancel_all()] == [1, 3]
    assert (roster.running, roster.waiting) == ([], 0)


def test_all_outputs_of_a_request_get_their_slots_at_once() -> None:
    roster = Roster(max_running=3)
    for number, n in ((1, 2), (2, 2), (3, 1)):
        roster.submit(request(number, n=n), CONTEXT)
    assert admit_all(roster) == [1]
    assert (len(roster.running), roster.waiting) == (2, 3)
    assert [output.index for output in roster.cancel(1)] == [0, 1]
    assert admit_all(roster) == [2, 3]
    assert [(one.request.id, one.index) for one in roster.running] == [(2, 0), (2, 1), (3, 0)]


def test_one_output_is_cancelled_in_a_slot_and_in_the_queue() -> None:
    roster = Roster(max_running=2)
    for number in (1, 2):
        roster.submit(request(number, n=2), CONTEXT)
    admit_all(roster)
    for number in (1, 2):
        assert roster.cancel(number, 0) == [Output(number, finish=Finish.CANCELLED)]
        assert roster.cancel(number, 0) == []
    assert roster.waiting == 1
    assert admit_all(roster) == [2]
    assert [(one.request.id, one.index) for one in roster.running] == [(1, 1), (2, 1)]


def test_more_outputs_than_slots_are_refused() -> None:
    roster = Roster(max_running=2)
    (refusal,) = roster.submit(request(1, n=3), CONTEXT)
    assert "3 outputs" in refusal.error
    assert roster.waiting == 0
