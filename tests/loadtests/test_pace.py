"""When requests are due, and the notice that is taken of a client that is late."""

import time
from itertools import islice, pairwise

import gevent
import numpy as np
import pytest

from loadtests.pace import Arrivals, Pulse, Schedule, moments


def gaps(arrivals: Arrivals, seed: int = 0, count: int = 4000) -> list[float]:
    """Between requests at five per second."""
    return [later - earlier for earlier, later in pairwise([0.0, *islice(moments(5, arrivals, seed), count)])]


def test_poisson_arrivals_have_their_rate_and_exponential_gaps() -> None:
    intervals = np.array(gaps("poisson"))
    assert intervals.mean() == pytest.approx(0.2, rel=0.05)
    assert intervals.std() == pytest.approx(0.2, rel=0.05)
    assert np.median(intervals) == pytest.approx(0.2 * np.log(2), rel=0.05)
    assert abs(np.corrcoef(intervals[1:], intervals[:-1])[0, 1]) < 0.05


def test_even_arrivals_have_equal_gaps() -> None:
    assert gaps("even") == pytest.approx([0.2] * 4000)


def test_the_same_seed_gives_the_same_schedule_and_another_one_another() -> None:
    assert gaps("poisson", seed=1) == gaps("poisson", seed=1)
    assert gaps("poisson", seed=1) != gaps("poisson", seed=2)


def test_every_moment_is_taken_once_and_what_is_not_sent_is_known() -> None:
    schedule = Schedule(iter([0.0, 0.01, 0.02, 0.03, 9.0, 10.0]), users=2)
    first = gevent.spawn(schedule.take)
    gevent.sleep(0.05)
    assert not first.ready(), "not all users are there"
    assert schedule.unsent(until=time.perf_counter() + 9) == []
    second = schedule.take()
    start = first.get(timeout=5) - 0.01
    assert start == pytest.approx(time.perf_counter(), abs=5)
    assert second == start
    schedule.sent(second)
    third = schedule.take()
    backlog = schedule.unsent(until=start + 5)
    assert sorted(backlog) == pytest.approx([start + 0.01, third, start + 0.03]), "neither sent nor in the future"


def test_a_client_that_was_busy_knows_for_how_long() -> None:
    pulse = Pulse()
    gevent.sleep(0.05)
    before = time.perf_counter()
    time.sleep(1)
    assert pulse.worst_since(before) >= 0.9, "before the pulse itself could notice"
    gevent.sleep(0.05)
    assert pulse.worst_since(before) >= 0.9
    assert pulse.worst_since(time.perf_counter()) < 0.8
    pulse.stop()
