"""A producer that encodes and prunes, a consumer that answers, and the proxy before them: as one server answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.support.chat import (
    SMALL_KV_CACHE,
    Body,
    Server,
    by_energy,
    fresh_url,
    image_part,
    kept,
    random_model,
    text_of,
    tokens,
    user,
)
from tests.support.process_tree import family, kill
from vllm_vtprune_server.process import running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify, pytest.mark.timeout(1200)]

PROXY = Path(__file__).parents[2] / "deploy" / "disaggregation" / "proxy.py"
QUESTION = "Where is the dog and the red bus?"
OPTIONS = [
    *random_model(),
    *("--max-model-len", "2048"),
    *SMALL_KV_CACHE,
    *("--dtype", "float32"),
    "--enforce-eager",
]
CLIENTS = 4
ENDS_WITHIN = 30.0  # seconds, on busy cores


def ask(policy: object, *images: Body | str, **fields: Any) -> Body:
    messages = [user(QUESTION, *(images or (fresh_url(),)))]
    return {"messages": messages, "pruning": policy, "max_tokens": 6, "logprobs": True, **fields}


CASES = {
    "tokens": ask(tokens(40)),
    "ratio": ask({"budget": {"type": "ratio", "keep": 0.2}}),
    "preset": ask("fast"),
    "hooks": ask(tokens(50, method="visionzip")),
    "without text": ask(tokens(30, method="divprune")),
    "unpruned": ask(False),
    "two images": ask(tokens(60), fresh_url(), image_part(fresh_url(), pruning=tokens(20))),
}
STREAMED = ask(tokens(44), stream_options={"include_usage": True})
ALTERED, MISSING = ask(tokens(45)), ask(tokens(46))
REFUSED = {
    "policy": ask({"methd": "divprune"}),
    "image": ask("fast", "data:image/png;base64,AAAA"),
    "model": ask("fast", model="unknown"),
}


@dataclass(frozen=True)
class Deployment:
    """What one server answered, and the servers of the disaggregated deployment."""

    alone: dict[str, Body]
    alone_streamed: list[Body]
    refused_alone: dict[str, tuple[int, Body]]
    producer: Server
    consumer: Server
    proxy: Server
    store: Path

    @property
    def files(self) -> set[Path]:
        """The embeddings that the producer has saved."""
        return set(self.store.glob("*/*.safetensors"))


def serving(store: Path, role: str) -> list[str]:
    connector = {"ec_connector": "ECExampleConnector", "ec_role": role}
    connector |= {"ec_connector_extra_config": {"shared_storage_path": str(store)}}
    return [*OPTIONS, "--pruning-placement", "engine", "--ec-transfer-config", json.dumps(connector)]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("disaggregation")
    store = folder / "store"
    store.mkdir()
    with running_server(OPTIONS, log=folder / "alone.log") as url:
        server = Server(url, folder / "alone.log")
        bodies = {**CASES, "altered": ALTERED, "missing": MISSING}
        alone = {name: server.ask(**body) for name, body in bodies.items()}
        streamed = server.stream(**STREAMED)
        refused = {name: refusal(server, body) for name, body in REFUSED.items()}
    with ExitStack() as stack:

        def start(name: str, arguments: list[str], **options: Any) -> Server:
            log = folder / f"{name}.log"
            return Server(stack.enter_context(running_server(arguments, log=log, **options)), log)

        producer = start("producer", serving(store, "ec_producer"))
        consumer = start("consumer", serving(store, "ec_consumer"))
        addresses = ["--encoders", producer.url, "--decoders", consumer.url]
        proxy = start("proxy", addresses, command=[str(PROXY)])
        yield Deployment(alone, streamed, refused, producer, consumer, proxy, store)


def refusal(server: Server, body: Body) -> tuple[int, Body]:
    response = server.post(body)
    return response.status_code, response.json()


def logprobs(answer: Body) -> list[float]:
    return [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]


def report(answer: Body) -> Body:
    """The report and the usage, without times."""
    pruning = {name: value for name, value in answer["pruning"].items() if name != "timings_ms"}
    return {"pruning": pruning, "usage": answer["usage"]}


def assert_same(answer: Body, expected: Body) -> None:
    assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
    assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-3)
    assert report(answer) == report(expected)


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_that_of_one_server(deployment: Deployment, name: str) -> None:
    before = deployment.files
    answer = deployment.proxy.ask(**CASES[name])
    assert_same(answer, deployment.alone[name])
    assert len(deployment.files - before) == len(kept(answer)), "the producer saves each image"


def test_a_stream_is_that_of_one_server(deployment: Deployment) -> None:
    chunks = deployment.proxy.stream(**STREAMED)
    expected = deployment.alone_streamed
    assert text_of(chunks) == text_of(expected)
    assert report(chunks[-1]) == report(expected[-1])


def test_the_consumer_loads_what_the_producer_saved(deployment: Deployment) -> None:
    before = deployment.files
    assert deployment.producer.post({**ALTERED, "max_tokens": 1}).status_code == 200
    (file,) = deployment.files - before
    saved = load_file(file)
    assert [len(rows) for rows in saved.values()] == [45]
    save_file({name: -rows for name, rows in saved.items()}, file)
    difference = [
        abs(ours - theirs)
        for ours, theirs in zip(
            logprobs(deployment.consumer.ask(**ALTERED)), logprobs(deployment.alone["altered"]), strict=True
        )
    ]
    assert max(difference) > 0.1


def test_a_consumer_encodes_and_prunes_what_nobody_saved(deployment: Deployment) -> None:
    before = deployment.files
    assert_same(deployment.consumer.ask(**MISSING), deployment.alone["missing"])
    assert deployment.files == before


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_that_of_one_server(deployment: Deployment, name: str) -> None:
    assert refusal(deployment.proxy, REFUSED[name]) == deployment.refused_alone[name]


def test_energy_budgets_are_refused(deployment: Deployment) -> None:
    status, answer = refusal(deployment.proxy, ask(by_energy(40)))
    assert (status, answer["error"]["param"]) == (400, "pruning.budget.type")
    assert 'expected "tokens" or "ratio"' in answer["error"]["message"]


def test_a_killed_producer_hangs_nobody_and_a_new_one_is_used(
    deployment: Deployment, record_property: Callable[[str, object], None]
) -> None:
    answers: list[tuple[float, float, int, str]] = []  # begun, ended, status, body
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            begun = time.monotonic()
            response = deployment.proxy.post({"messages": [user(QUESTION, fresh_url())], "pruning": "fast"})
            answers.append((begun, time.monotonic(), response.status_code, response.text))
            time.sleep(0.1)

    def wait_for(status: int, after: float, seconds: float) -> None:
        """Wait until so many requests as there are clients, begun after that moment, got this status."""
        deadline = time.monotonic() + seconds
        while sum(begun > after and got == status for begun, _, got, _ in list(answers)) < CLIENTS:
            assert time.monotonic() < deadline, answers[-5:]
            time.sleep(0.2)

    port = int(deployment.producer.url.rpartition(":")[2])
    (process,) = [child for child in psutil.Process().children() if str(port) in child.cmdline()]
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        wait_for(200, after=0, seconds=120)
        killed = time.monotonic()
        kill(family(process.pid))
        wait_for(503, after=killed, seconds=ENDS_WITHIN)
        again = running_server(
            serving(deployment.store, "ec_producer"), port=port, log=deployment.store.with_name("again.log")
        )
        with again:
            back = time.monotonic()
            wait_for(200, after=back, seconds=120)
            done.set()
            for thread in threads:
                thread.join()
    finally:
        done.set()
    slowest = max(ended - begun for begun, ended, *_ in answers if ended > killed)
    record_property("slowest request after the producer was killed, seconds", round(slowest, 2))
    assert slowest < ENDS_WITHIN
    assert {status for _, _, status, _ in answers} == {200, 503}
    assert {status for begun, _, status, _ in answers if begun > back} == {200}
    for _, _, status, body in answers:
        assert status == 200 or deployment.producer.url in json.loads(body)["error"]["message"]
