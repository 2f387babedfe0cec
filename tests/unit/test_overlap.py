"""What a lane is told that its transfers cost."""

import time

import torch.distributed as dist

from csps.parallel.overlap import CommClock, CommThread, ThreadHandle

NAP_S = 0.05


def nap() -> list[dist.Work]:
    time.sleep(NAP_S)
    return []


def test_a_transfer_is_exposed_while_it_is_under_way() -> None:
    """Not while the thread that runs it is not there yet."""
    clock, thread = CommClock(), CommThread("comm")
    thread.submit(nap)  # nobody waits for it
    late = ThreadHandle(thread.submit(list), clock)
    late.wait()
    assert 0.0 <= clock.exposed_s <= clock.comm_s
    thread.close()


def test_what_is_over_when_it_is_waited_for_is_not_exposed() -> None:
    clock, thread = CommClock(), CommThread("comm")
    future = thread.submit(nap)
    future.result()
    ThreadHandle(future, clock).wait()
    assert clock.exposed_s == 0.0
    assert clock.comm_s >= NAP_S
    thread.close()
