"""The vision encoder of another process, which serves all API processes that encode on its device."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

from vllm_vtprune.allotment import Energies
from vllm_vtprune.encoder import Encoded, PlannedImage
from vllm_vtprune.features import PreparedImage
from vllm_vtprune.plugin import messages
from vllm_vtprune.plugin.channel import Channel
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.report import StageRun
from vllm_vtprune.vision_encoder import EncoderError

logger = init_logger("vllm.vtprune")

SOCKETS = "VTPRUNE_ENCODER_SOCKETS"
"""Environment variable: directory of the encoder processes' sockets, named after their devices. `vtprune serve` sets
it for its API processes; without it, each has an encoder of its own."""

POLL = 0.1  # seconds
START_TIMEOUT = 600.0  # seconds


class EncoderUnavailable(GracefulHTTPError):
    """The vision encoder process has ended, and the next one is not ready."""

    def __init__(self) -> None:
        super().__init__(
            "The vision encoder process ended; it is being restarted. Retry.", HTTPStatus.SERVICE_UNAVAILABLE
        )


def socket_of(device: str) -> Path | None:
    """The socket of the process that encodes on a device; None if API processes encode themselves."""
    directory = os.environ.get(SOCKETS)
    return None if directory is None else Path(directory) / device


class Ticket:
    """Features that the encoder process holds for one request, as long as this object lives."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self.number = channel, number
        weakref.finalize(self, channel.send, messages.Release(number)).atexit = False


class EncoderClient:
    """An `ImageEncoder` that another process runs. Thread-safe.

    Connects again when that process has been restarted. While it is gone, everything asked of it fails at once.

    Args:
        path: socket of the encoder process.
    """

    def __init__(self, path: Path) -> None:
        self.num_parameters: int | None = None
        self._path = path
        self._numbers = count()
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._pending: dict[int, Future[Any]] = {}

    def connect(self) -> None:
        """Wait for the encoder process to start.

        Raises:
            EncoderError: it ended instead.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while not self._connect():
            if not self._path.parent.exists() or time.monotonic() > deadline:
                raise EncoderError("the vision encoder process did not start; see its last log lines above")
            time.sleep(POLL)

    def find(self, key: str) -> Future[Encoded[Ticket]] | None:
        ticket = next(self._numbers)
        number = next(self._numbers)
        encoded: Future[Encoded[Ticket]] = Future()
        answer = self._ask({number: Future(), ticket: encoded}, messages.Find(number, ticket, key))[number]
        try:
            known = answer.result()
        except EncoderUnavailable:  # as `encoded` will say
            known = True
        if known:
            return self._released_on_cancel(ticket, encoded)
        with self._lock:
            self._pending.pop(ticket, None)
        return None

    def submit(self, key: str, image: PreparedImage) -> Future[Encoded[Ticket]]:
        number = next(self._numbers)
        encoded: Future[Encoded[Ticket]] = Future()
        self._ask({number: encoded}, messages.Submit(number, key, image.item, image.layout.dump()))
        return self._released_on_cancel(number, encoded)

    def plan_image(
        self, encoded: Encoded[Ticket], policy: PruningPolicy, noun_ids: Sequence[int], key: str | None = None
    ) -> PlannedImage:
        ticket, number = encoded.features, next(self._numbers)
        message = messages.Plan(number, ticket.number, policy.dump(), tuple(noun_ids))
        planned: Future[PlannedImage] = Future()
        self._ask({number: planned}, message, ticket.channel)
        return planned.result()

    def measure(self, encoded: Encoded[Ticket], key: str) -> Energies:
        ticket, number = encoded.features, next(self._numbers)
        measured: Future[Energies] = Future()
        self._ask({number: measured}, messages.Measure(number, ticket.number), ticket.channel)
        return measured.result()

    def warm_up(self, image: PreparedImage) -> None:
        number = next(self._numbers)
        self._ask({number: Future()}, messages.WarmUp(number))[number].result()

    def renewed(self) -> EncoderClient:
        """The same: the encoder process follows the engine's weights itself."""
        return self

    def forget_images(self) -> None:
        number = next(self._numbers)
        with suppress(EncoderUnavailable):  # then it holds none
            self._ask({number: Future()}, messages.ForgetImages(number))[number].result()

    def _ask(
        self, futures: dict[int, Future[Any]], message: messages.Request, channel: Channel | None = None
    ) -> dict[int, Future[Any]]:
        """Send a message, and register the futures of its replies; they fail if ``channel`` is not the current one."""
        with self._lock:
            if self._channel is None or channel not in (None, self._channel):
                fail(futures)
            else:
                self._channel.send(message)
                self._pending.update(futures)
        return futures

    def _released_on_cancel(self, ticket: int, encoded: Future[Encoded[Ticket]]) -> Future[Encoded[Ticket]]:
        def release(future: Future[Encoded[Ticket]]) -> None:
            if future.cancelled():
                with self._lock:
                    waiting = self._pending.pop(ticket, None)
                    if waiting is not None and self._channel is not None:
                        self._channel.send(messages.Release(ticket))

        encoded.add_done_callback(release)
        return encoded

    def _connect(self) -> bool:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            return False
        channel = Channel(connection, messages.Reply, on_message=self._receive, on_close=self._lost)
        with self._lock:
            self._channel = channel
        channel.start()
        return True

    def _receive(self, reply: messages.Reply) -> None:
        if isinstance(reply, messages.Loaded):
            self.num_parameters = reply.parameters
            return
        with self._lock:
            future, channel = self._pending.pop(reply.id, None), self._channel
        if future is None:  # cancelled, and the reply was under way
            return
        assert channel is not None
        with suppress(InvalidStateError):  # cancelled right now
            match reply:
                case messages.Failed():
                    future.set_exception(reply.error())
                case messages.Known(known=known):
                    future.set_result(known)
                case messages.Encoded(id=number, fresh=fresh, began=began, seconds=seconds):
                    forward = None if began is None else StageRun("encode", began, seconds)
                    future.set_result(Encoded(Ticket(channel, number), forward, fresh))
                case messages.Planned(plan=plan):
                    future.set_result(plan)
                case messages.Measured(energies=energies):
                    future.set_result(energies)
                case messages.Done():
                    future.set_result(None)

    def _lost(self) -> None:
        """Fail whatever waits, then connect to the next process."""
        with self._lock:
            self._channel, pending, self._pending = None, self._pending, {}
        self.num_parameters = None
        logger.error("The vision encoder process ended: %d unfinished tasks of this process fail", len(pending))
        fail(pending)
        while not self._connect():
            if not self._path.parent.exists():  # the server has ended
                return
            time.sleep(POLL)
        logger.info("Connected to the restarted vision encoder process")


def fail(futures: dict[int, Future[Any]]) -> None:
    """Fail futures whose encoder process has ended."""
    for future in futures.values():
        with suppress(InvalidStateError):  # cancelled
            future.set_exception(EncoderUnavailable())
