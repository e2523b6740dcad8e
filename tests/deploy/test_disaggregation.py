"""A producer that encodes and prunes, a consumer that answers, and the proxy before them: as one server answers.

LLaVA, whose counted budgets an engine follows alone, and Qwen3-VL, whose kept tokens have positions of three numbers.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.chat import (
    SMALL_KV_CACHE,
    Body,
    Server,
    image_part,
    kept,
    text_of,
    tokens,
    url_of,
    user,
)
from tests.support.process_tree import arguments_of, family, kill
from vllm_vtprune.sent_plan import PLANS
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_server.process import running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify, pytest.mark.timeout(1200)]

PROXY = Path(__file__).parents[2] / "deploy" / "disaggregation" / "proxy.py"
QUESTION = "Where is the dog and the red bus?"
OPTIONS = ["--max-model-len", "2048", *SMALL_KV_CACHE, "--dtype", "float32", "--enforce-eager"]
DEFAULT = ("--pruning-default", "balanced")
CLIENTS = 4
ENDS_WITHIN = 30.0  # seconds, on busy cores


_seeds = count()


def picture() -> str:
    """Noise that no earlier request showed: 80 tokens of Qwen3-VL."""
    noise = np.random.default_rng([7, next(_seeds)]).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    return url_of(Image.fromarray(noise))


def ask(policy: object, *images: Body | str, **fields: Any) -> Body:
    messages = [user(QUESTION, *(images or (picture(),)))]
    return {"messages": messages, "pruning": policy, "max_tokens": 6, "logprobs": True, **fields}


ENERGY: Body = {"budget": {"type": "energy", "threshold": 0.8, "min_tokens": 8}}
CASES = {
    "tokens": ask(tokens(40)),
    "energy": ask(ENERGY),
    "default": ask(None),
    "preset": ask("fast"),
    "hooks": ask(tokens(50, method="visionzip")),
    "merged": ask({**ENERGY, "method": "tome"}),
    "without text": ask(tokens(30, method="divprune")),
    "positions": ask({**tokens(30), "return_kept": True}),
    "of the request": ask({"budget": {"type": "tokens", "keep": 60, "scope": "request"}}, picture(), picture()),
    "unpruned": ask(False),
    "two images": ask(tokens(60), picture(), image_part(picture(), pruning=ENERGY)),
    "beside an unpruned one": ask(ENERGY, picture(), image_part(picture(), pruning=False)),
}
LACKING = {"llava": (), "qwen3_vl": ("hooks", "merged")}
"""Cases of methods that a family has no inputs for."""
STREAMED = ask(ENERGY, stream_options={"include_usage": True})
COUNTS: dict[str, Body] = {"tokens": tokens(25), "energy": ENERGY, "merged": {**ENERGY, "method": "tome"}}
ALTERED = {name: ask(policy) for name, policy in COUNTS.items()}
MISSING = {name: ask(policy) for name, policy in COUNTS.items()}
REFUSED = {
    "policy": ask({"methd": "divprune"}),
    "image": ask("fast", "data:image/png;base64,AAAA"),
    "model": ask("fast", model="unknown"),
}


@dataclass(frozen=True)
class Deployment:
    """What one server answered, and the servers of the disaggregated deployment."""

    family: str
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

    def produce(self, body: Body) -> tuple[Body, Path]:
        """Have the producer encode an image: the consumer's request, as the proxy makes it, and the file saved."""
        before = self.files
        answer = self.producer.ask(**body, **{PLANS: True})
        (file,) = self.files - before
        return {**body, **({PLANS: answer[PLANS]} if any(answer.get(PLANS, ())) else {})}, file


def serving(family: str, store: Path, role: str) -> list[str]:
    connector = {"ec_connector": "ECExampleConnector", "ec_role": role}
    connector |= {"ec_connector_extra_config": {"shared_storage_path": str(store)}}
    return [*model(family), *OPTIONS, *DEFAULT, "--ec-transfer-config", json.dumps(connector)]


def model(family: str) -> list[str]:
    return [str(tiny_checkpoint(family)), "--served-model-name", "vtprune-demo"]


@pytest.fixture(scope="module")
def deployments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Deployment]]:
    """Those of the families, each started at its first test."""
    with ExitStack() as stack:
        yield cache(lambda family: stack.enter_context(deployed(family, tmp_path_factory)))


@pytest.fixture
def deployment(deployments: Callable[[str], Deployment], family: str) -> Deployment:
    return deployments(family)


@contextmanager
def deployed(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("disaggregation")
    store = folder / "store"
    store.mkdir()
    with running_server([*model(family), *OPTIONS, *DEFAULT], log=folder / "alone.log") as url:
        server = Server(url, folder / "alone.log")
        bodies = {**CASES, **numbered("altered", ALTERED), **numbered("missing", MISSING)}
        alone = {name: server.ask(**body) for name, body in bodies.items() if name.split()[-1] not in LACKING[family]}
        streamed = server.stream(**STREAMED)
        refused = {name: refusal(server, body) for name, body in REFUSED.items()}
    with ExitStack() as stack:

        def start(name: str, arguments: list[str], **options: Any) -> Server:
            log = folder / f"{name}.log"
            return Server(stack.enter_context(running_server(arguments, log=log, **options)), log)

        with ThreadPoolExecutor() as pool:  # a start keeps one core busy
            roles = ("producer", "consumer")
            producer, consumer = pool.map(lambda role: start(role, serving(family, store, f"ec_{role}")), roles)
        addresses = ["--encoders", producer.url, "--decoders", consumer.url]
        proxy = start("proxy", addresses, command=[str(PROXY)])
        yield Deployment(family, alone, streamed, refused, producer, consumer, proxy, store)


def numbered(prefix: str, bodies: dict[str, Body]) -> dict[str, Body]:
    return {f"{prefix} {name}": body for name, body in bodies.items()}


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


every_family = pytest.mark.parametrize("family", LACKING)


def every(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Every case of every family that has it."""
    rows = [(family, name) for family, lacking in LACKING.items() for name in cases if name not in lacking]
    return pytest.mark.parametrize(("family", "name"), rows)


@every(CASES)
def test_the_answer_is_that_of_one_server(deployment: Deployment, name: str) -> None:
    before = deployment.files
    answer = deployment.proxy.ask(**CASES[name])
    assert_same(answer, deployment.alone[name])
    assert len(deployment.files - before) == len(kept(answer)), "the producer saves each image"
    again = deployment.proxy.ask(**CASES[name])
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]
    assert len(deployment.files - before) == len(kept(answer)), "and each once"
    assert [image["cached"] for image in again["pruning"]["images"] if image["method"] != "none"].count(False) == 0


@every_family
def test_a_stream_is_that_of_one_server(deployment: Deployment) -> None:
    chunks = deployment.proxy.stream(**STREAMED)
    expected = deployment.alone_streamed
    assert text_of(chunks) == text_of(expected)
    assert report(chunks[-1]) == report(expected[-1])


@every(COUNTS)
def test_the_consumer_loads_what_the_producer_saved(deployment: Deployment, name: str) -> None:
    body, file = deployment.produce(ALTERED[name])
    expected = deployment.alone[f"altered {name}"]
    saved = load_file(file)
    assert [len(rows) for rows in saved.values()] == kept(expected)
    save_file({name: -rows for name, rows in saved.items()}, file)
    altered = logprobs(deployment.consumer.ask(**body))
    assert max(abs(value - reference) for value, reference in zip(altered, logprobs(expected), strict=True)) > 0.1


@every(COUNTS)
def test_a_consumer_encodes_and_prunes_what_is_not_saved(deployment: Deployment, name: str) -> None:
    body, file = deployment.produce(MISSING[name])
    file.unlink()
    before = deployment.files
    assert_same(deployment.consumer.ask(**body), deployment.alone[f"missing {name}"])
    assert deployment.files == before


@every(REFUSED)
def test_an_error_is_that_of_one_server(deployment: Deployment, name: str) -> None:
    assert refusal(deployment.proxy, REFUSED[name]) == deployment.refused_alone[name]


@every_family
def test_without_the_proxy_a_consumer_refuses_what_needs_a_plan(deployment: Deployment) -> None:
    status, answer = refusal(deployment.consumer, ask(ENERGY))
    assert (status, answer["error"]["param"]) == (400, "pruning.budget.type")
    assert "the request brings no plan of a producer" in answer["error"]["message"]
    wrong = {"visual_tokens": 9, "kept_tokens": 1, "kept": {"grid": None, "runs": [[0, 1]], "tiles": [], "view": None}}
    status, answer = refusal(deployment.consumer, ask(ENERGY, **{PLANS: [wrong]}))
    assert (status, answer["error"]["param"]) == (400, f"{PLANS}.0")
    assert deployment.consumer.get("/health").status_code == 200
    assert "Vision encoder loaded" not in deployment.consumer.log.read_text()
    assert deployment.consumer.metrics()["vtprune:build_info|placement=engine"] == 1


@pytest.mark.parametrize("family", ["llava"])  # the proxy knows no families
def test_a_killed_producer_hangs_nobody_and_a_new_one_is_used(
    deployment: Deployment, record_property: Callable[[str, object], None]
) -> None:
    answers: list[tuple[float, float, int, str]] = []  # begun, ended, status, body
    done = threading.Event()

    def client() -> None:
        while not done.is_set():
            begun = time.monotonic()
            response = deployment.proxy.post({"messages": [user(QUESTION, picture())]})
            answers.append((begun, time.monotonic(), response.status_code, response.text))
            time.sleep(0.1)

    def wait_for(status: int, after: float, seconds: float) -> None:
        """Wait until so many requests as there are clients, begun after that moment, got this status."""
        deadline = time.monotonic() + seconds
        while sum(begun > after and got == status for begun, _, got, _ in list(answers)) < CLIENTS:
            assert time.monotonic() < deadline, answers[-5:]
            time.sleep(0.2)

    port = int(deployment.producer.url.rpartition(":")[2])
    (process,) = [child for child in psutil.Process().children() if str(port) in arguments_of(child)]
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        wait_for(200, after=0, seconds=120)
        killed = time.monotonic()
        kill(family(process.pid))
        wait_for(503, after=killed, seconds=ENDS_WITHIN)
        arguments = serving(deployment.family, deployment.store, "ec_producer")
        again = running_server(arguments, port=port, log=deployment.store.with_name("again.log"))
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
