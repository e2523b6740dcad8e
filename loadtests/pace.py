"""A schedule of requests at a constant rate, and the delay with which this process reads its connections."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import takewhile
from random import Random
from typing import Literal, get_args

import gevent
from gevent.event import AsyncResult

Arrivals = Literal["poisson", "even"]
ARRIVALS: tuple[Arrivals, ...] = get_args(Arrivals)

BEAT = 0.01  # seconds
BEATS_KEPT = 60_000  # ten minutes


def moments(rate: float, arrivals: Arrivals, seed: int) -> Iterator[float]:
    """Endless times at which requests are due, in seconds after the start; the same for the same seed.

    Args:
        rate: per second, on average.
        arrivals: poisson: the gaps are exponentially distributed, as in ``vllm bench serve`` with burstiness 1; even:
            all gaps are equal.
        seed: of the gaps.
    """
    random = Random(f"{seed} arrivals")
    at = 0.0
    while True:
        at += random.expovariate(rate) if arrivals == "poisson" else 1 / rate
        yield at


class Schedule:
    """Hands out the times at which requests are due, on the clock of `time.perf_counter`."""

    def __init__(self, after: Iterator[float], users: int) -> None:
        """
        Args:
            after: seconds after the start, ascending.
            users: the schedule starts when that many users have asked for a time.
        """
        self._after = after
        self._missing = users
        self._start = AsyncResult()
        self._taken: set[float] = set()

    def take(self) -> float:
        """Wait for the start, then return the next time that no user has taken. It may have passed."""
        if not self._start.ready():
            self._missing -= 1
            if self._missing == 0:
                self._start.set(time.perf_counter())
        start: float = self._start.get()
        moment = start + next(self._after)
        self._taken.add(moment)
        return moment

    def sent(self, moment: float) -> None:
        """Note that the request of a taken time was sent."""
        self._taken.remove(moment)

    def unsent(self, until: float) -> list[float]:
        """All times up to this one whose requests were not sent. Consumes the schedule: call it at the end."""
        if not self._start.ready():
            return []
        start: float = self._start.get()
        late = [moment for moment in self._taken if moment <= until]
        return [*late, *takewhile(lambda moment: moment <= until, (start + after for after in self._after))]


class Pulse:
    """Records how late the event loop wakes a greenlet that sleeps 10 ms at a time.

    A time stamp of received data is at most that late.
    """

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque(maxlen=BEATS_KEPT)  # when, and seconds
        self.last = time.perf_counter()
        """Time of the last wake-up."""
        self._greenlet = gevent.spawn(self._beat)

    def _beat(self) -> None:
        while True:
            gevent.sleep(BEAT)
            now = time.perf_counter()
            self._late.append((now, now - self.last - BEAT))
            self.last = now

    def worst_since(self, moment: float) -> float:
        """Longest delay since this time (`time.perf_counter`), in seconds."""
        worst = max(0.0, time.perf_counter() - self.last - BEAT)
        for at, late in reversed(self._late):
            if at < moment:
                break
            worst = max(worst, late)
        return worst

    def stop(self) -> None:
        self._greenlet.kill()
