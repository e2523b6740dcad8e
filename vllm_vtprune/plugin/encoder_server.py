"""The vision encoder process: encodes and plans for all API processes that connect to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm.logger import init_logger

from vllm_vtprune.encoder import Encoded
from vllm_vtprune.features import Layout, PreparedImage, VisualFeatures
from vllm_vtprune.plugin import messages
from vllm_vtprune.plugin.channel import Channel
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.runtime import PruningRuntime

logger = init_logger("vllm.vtprune")


class EncoderServer:
    """Serves the local encoder of a runtime to other processes.

    Args:
        runtime: has the encoder.
        clients: API processes that connect; each plans one image at a time.
        follow: resets the runtime if the engine has loaded other weights; called before an image is looked up.
        warm_up: loads the encoder and warms it up.
        on_load: called when the encoder has been loaded.
    """

    def __init__(
        self,
        runtime: PruningRuntime,
        *,
        clients: int,
        follow: Callable[[], None],
        warm_up: Callable[[], None],
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self.runtime = runtime
        self.planners = ThreadPoolExecutor(clients, thread_name_prefix="vtprune-planner")
        self.sessions: set[_Session] = set()
        self._follow, self._warm_up, self._on_load = follow, warm_up, on_load
        self._parameters: int | None = None
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the listener is closed."""
        while True:
            connection, _ = listener.accept()
            session = _Session(self, connection)
            with self._lock:
                self.sessions.add(session)
                session.channel.send(messages.Loaded(self._parameters))
            session.channel.start()

    def follow(self) -> None:
        """Forget features and weights if the engine has loaded others."""
        with self._lock:
            self._follow()
        self.announce()

    def warm_up(self) -> None:
        """Load the encoder and warm it up, unless it is loaded."""
        with self._lock:
            if self.runtime.encoder.num_parameters is None:
                self._warm_up()
        self.announce()

    def announce(self) -> None:
        """Tell all API processes if the encoder has been loaded or dropped."""
        parameters = self.runtime.encoder.num_parameters
        with self._lock:
            if parameters == self._parameters:
                return
            self._parameters = parameters
            for session in self.sessions:
                session.channel.send(messages.Loaded(parameters))
        if parameters is not None:
            self._on_load()


class _Session:
    """One API process, and the features that it holds tickets of."""

    def __init__(self, server: EncoderServer, connection: socket.socket) -> None:
        self._server = server
        self._tickets: dict[int, tuple[str, Future[Encoded[VisualFeatures]]]] = {}
        self.channel = Channel(connection, messages.Request, on_message=self._handle, on_close=self._close)

    def _handle(self, request: Any) -> None:
        server = self._server
        try:
            match request:
                case messages.Find(id=number, ticket=ticket, key=key):
                    server.follow()
                    encoding = server.runtime.encoder.find(key)
                    self.channel.send(messages.Known(number, encoding is not None))
                    if encoding is not None:
                        self._hold(ticket, key, encoding)
                case messages.Submit(id=ticket, key=key, item=item, layout=layout):
                    server.follow()
                    image = PreparedImage(item, Layout.load(layout))
                    self._hold(ticket, key, server.runtime.encoder.submit(key, image))
                case messages.Release(id=ticket):
                    held = self._tickets.pop(ticket, None)
                    if held is not None:
                        held[1].cancel()
                case messages.Plan(id=number, ticket=ticket):
                    planned = partial(self._planned, request, *self._tickets[ticket])
                    server.planners.submit(self._answer, number, planned)
                case messages.Measure(id=number, ticket=ticket):
                    measured = partial(self._measured, request, *self._tickets[ticket])
                    server.planners.submit(self._answer, number, measured)
                case messages.WarmUp(id=number):
                    server.planners.submit(self._answer, number, partial(self._done, number, server.warm_up))
                case messages.ForgetImages(id=number):
                    self._answer(number, partial(self._done, number, server.runtime.encoder.forget_images))
        except Exception as error:
            self._fail(request.id, error)

    def _hold(self, ticket: int, key: str, encoding: Future[Encoded[VisualFeatures]]) -> None:
        self._tickets[ticket] = key, encoding
        encoding.add_done_callback(partial(self._encoded, ticket))

    def _encoded(self, ticket: int, encoding: Future[Encoded[VisualFeatures]]) -> None:
        if encoding.cancelled():
            return
        self._server.announce()
        error = encoding.exception()
        if error is not None:
            self._tickets.pop(ticket, None)
            self._fail(ticket, error)
            return
        encoded = encoding.result()
        forward = encoded.forward
        began, seconds = (None, 0.0) if forward is None else (forward.began, forward.seconds)
        self.channel.send(messages.Encoded(ticket, encoded.fresh, began, seconds))

    def _answer(self, number: int, answer: Callable[[], messages.Reply]) -> None:
        try:
            self.channel.send(answer())
        except Exception as error:
            self._fail(number, error)

    def _planned(self, plan: messages.Plan, key: str, encoding: Future[Encoded[VisualFeatures]]) -> messages.Planned:
        policy = PruningPolicy.parse(plan.policy)
        planned = self._server.runtime.encoder.plan_image(encoding.result(), policy, plan.noun_ids, key)
        return messages.Planned(plan.id, planned)

    def _measured(
        self, measure: messages.Measure, key: str, encoding: Future[Encoded[VisualFeatures]]
    ) -> messages.Measured:
        return messages.Measured(measure.id, self._server.runtime.encoder.measure(encoding.result(), key))

    def _done(self, number: int, task: Callable[[], None]) -> messages.Done:
        task()
        return messages.Done(number)

    def _fail(self, number: int, error: BaseException) -> None:
        if not isinstance(error, PolicyError):
            logger.error("The vision encoder failed for a request", exc_info=error)
        self.channel.send(messages.Failed.of(number, error))

    def _close(self) -> None:
        self._server.sessions.discard(self)
        for _, encoding in self._tickets.values():
            encoding.cancel()
        self._tickets.clear()
