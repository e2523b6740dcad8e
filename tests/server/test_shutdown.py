"""What a client is told of an answer that the engine gave up."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from vllm_vtprune_server import shutdown
from vllm_vtprune_server.serving import watch
from vllm_vtprune_server.shutdown import ServerStopping, failed_by_shutdown
from vllm_vtprune_server.trace import Trace


@pytest.fixture
def stopping() -> Iterator[None]:
    shutdown.stopping.set()
    yield
    shutdown.stopping.clear()


def watched(*finish_reasons: str | None) -> list[RequestOutput]:
    """What is passed on of a request with so many answers, of which some have ended."""
    outputs = [
        CompletionOutput(index, "half an", [1, 2], None, None, finish_reason=reason)
        for index, reason in enumerate(finish_reasons)
    ]
    result = RequestOutput("request", None, [3], None, outputs, finished=all(finish_reasons))

    async def results() -> AsyncGenerator[RequestOutput, None]:
        yield result

    async def collect() -> list[RequestOutput]:
        return [result async for result in watch(results(), Trace(), lambda result: result, stream=True)]

    return asyncio.run(collect())


@pytest.mark.usefixtures("stopping")
@pytest.mark.parametrize("finish_reasons", [("abort",), ("stop", "abort"), ("abort", None)])
def test_an_answer_that_a_stopping_engine_gave_up_is_an_error(finish_reasons: tuple[str | None, ...]) -> None:
    with pytest.raises(ServerStopping, match="shutting down"):
        watched(*finish_reasons)


@pytest.mark.usefixtures("stopping")
def test_an_answer_that_was_finished_in_time_is_none() -> None:
    [result] = watched("stop", "length")
    assert result.finished


def test_the_engine_may_know_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both at once."""
    monkeypatch.setattr(shutdown, "POLL", 2.0)
    timer = threading.Timer(0.05, shutdown.stopping.set)
    timer.start()
    try:
        with pytest.raises(ServerStopping):
            watched("abort")
    finally:
        timer.join()
        shutdown.stopping.clear()


def test_threads_that_are_gone_are_an_error_of_the_server_only_while_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = ThreadPoolExecutor()
    threads.shutdown()
    with pytest.raises(RuntimeError) as gone:
        threads.submit(print)
    assert not failed_by_shutdown(gone.value)
    monkeypatch.setattr(shutdown.stopping, "is_set", lambda: True)
    assert failed_by_shutdown(gone.value)
    assert not failed_by_shutdown(ValueError("of the client's making"))


def test_pausing_aborts_requests_as_stock_vllm_does() -> None:
    [result] = watched("abort")
    assert result.outputs[0].finish_reason == "abort"
