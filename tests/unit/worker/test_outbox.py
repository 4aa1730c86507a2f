from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice

from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.worker.outbox import Outbox


def event(number: int) -> pb.AttachResponse:
    return pb.AttachResponse(step=pb.Step(running=number))


def fill(outbox: Outbox) -> None:
    for number in range(Outbox.CAPACITY):
        outbox.send(event(number))


def test_events_come_in_order() -> None:
    outbox = Outbox()
    fill(outbox)
    assert [one.step.running for one in islice(outbox, 3)] == [0, 1, 2]


def test_a_full_outbox_makes_the_sender_wait_until_something_is_read() -> None:
    outbox = Outbox()
    fill(outbox)
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(outbox.send, event(7))
        assert not wait([sent], timeout=0.05).done
        next(outbox)
        sent.result(timeout=10)


def test_a_closed_outbox_frees_its_sender_and_ends_its_reader() -> None:
    outbox = Outbox()
    fill(outbox)
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(outbox.send, event(7))
        outbox.close()
        sent.result(timeout=10)
    assert list(outbox) == []


def test_a_closed_outbox_keeps_nothing() -> None:
    outbox = Outbox()
    outbox.close()
    for _ in range(2 * Outbox.CAPACITY):
        outbox.send(event(1))
    assert list(outbox) == []
