"""Asking a running server, over plain HTTP: what is sent and received is what the test writes and reads."""

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_evaluation.messages import data_url

DONE = "[DONE]"
VISUAL_TOKENS = 576
"""Of an image, in a checkpoint of LLaVA's family."""

SMALL_KV_CACHE = ("--kv-cache-memory-bytes", str(2**28))  # several servers run at the same time
ONE_ENGINE_PROCESS = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
"""Without a worker process, which vLLM has on CPUs: it imports vLLM once more, and both spin while they wait."""

_seeds = count()
# Requests do not share connections, so that several processes behind one address all get some.
_http = httpx.Client(timeout=500, verify=False, limits=httpx.Limits(max_keepalive_connections=0))

MAX_REFUSAL = 2048
"""Bytes of an answer that is an error."""

Body = dict[str, Any]

ENDLESS: Body = {"stream": True, "max_tokens": 1800, "ignore_eos": True, "n": 4, "temperature": 1}
"""A stream that is still running when its client hangs up or its server ends, on a fast machine too."""


def random_model() -> list[str]:
    """Options that serve the checkpoint with random weights, whose answers depend on every visual token."""
    return [str(tiny_checkpoint()), "--served-model-name", "vtprune-demo"]


@dataclass(frozen=True)
class Server:
    """A server that runs elsewhere. Every request opens a connection of its own."""

    url: str
    log: Path
    model: str = "vtprune-demo"

    def post(
        self,
        body: Mapping[str, Any] | bytes,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """The answer, whatever its status. A mapping is completed by `defaults`; bytes are sent as they are."""
        content = body if isinstance(body, bytes) else json.dumps({**self.defaults, **body}).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        return _http.post(f"{self.url}{path}", content=content, headers=headers)

    def get(self, path: str) -> httpx.Response:
        response = _http.get(f"{self.url}{path}")
        assert response.status_code == 200, response.text
        return response

    def ask(self, **body: Any) -> Body:
        """The answer to a request that has to succeed."""
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **body: Any) -> list[Body]:
        """The data events of a stream that has to succeed, parsed, without the final ``[DONE]``."""
        response = self.post({"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        data = data_of(response.text)
        assert data[-1] == DONE
        return [json.loads(event) for event in data[:-1]]

    @property
    def defaults(self) -> Body:
        return {"model": self.model, "max_tokens": 4, "temperature": 0}

    def metrics(self) -> "Metrics":
        text = self.get("/metrics").text
        values: dict[str, float] = {}
        for metric in text_string_to_metric_families(text):
            for sample in metric.samples:
                for key in [sample.name, *(f"{sample.name}|{label}={is_}" for label, is_ in sample.labels.items())]:
                    values[key] = values.get(key, 0.0) + sample.value
        return Metrics(values)


@dataclass(frozen=True)
class Metrics:
    """The values of ``/metrics``, by ``name`` (added up over its labels) and by ``name|label=value``."""

    values: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        return self.values.get(key, 0.0)

    def since(self, before: "Metrics", *keys: str) -> tuple[float, ...]:
        """How much each of the values grew."""
        return tuple(self[key] - before[key] for key in keys)


def data_of(text: str) -> list[str]:
    """The data of the events of a server-sent event stream."""
    assert text.endswith("\n\n"), "the last event is cut off"
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event and not event.startswith(":")]


def fresh_picture() -> Image.Image:
    """Noise that no earlier request showed, so that no cache knows it."""
    return Image.fromarray(np.random.default_rng(next(_seeds)).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def url_of(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """The image as a ``data:`` URL."""
    return data_url(image, format, **options)


def url_of_bytes(data: bytes, format: str = "PNG") -> str:
    return f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"


def fresh_url() -> str:
    return url_of(fresh_picture())


def image_part(url: str | None, **fields: Any) -> Body:
    """A content part; `fields` stand beside ``image_url``."""
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **fields}


def user(text: str, *images: Body | str) -> Body:
    """A user's message: the images, then the text."""
    parts = [image_part(image) if isinstance(image, str) else image for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def tokens(keep: int, **fields: Any) -> Body:
    """A policy that keeps so many."""
    return {"budget": {"type": "tokens", "keep": keep}, **fields}


def by_energy(keep: int) -> Body:
    """A policy that keeps so many, under a budget that needs features in the API process."""
    return {"budget": {"type": "energy", "min_tokens": keep, "max_tokens": keep}}


def kept(answer: Mapping[str, Any]) -> list[int]:
    """Tokens that each image kept."""
    return [image["kept_tokens"] for image in answer["pruning"]["images"]]


def nouns(answer: Mapping[str, Any]) -> list[list[str]]:
    return [image["nouns"] for image in answer["pruning"]["images"]]


def text_of(chunks: Iterable[Mapping[str, Any]], choice: int = 0) -> str:
    """What the chunks of a stream say, put together."""
    return "".join(
        part["delta"].get("content") or "" for chunk in chunks for part in chunk["choices"] if part["index"] == choice
    )


def leaks(text: str) -> list[str]:
    """What an answer should not show of the inside of a server: paths, source lines, tracebacks."""
    return re.findall(r"Traceback|site-packages|\w+\.py\b|\bline \d+|/(?:home|root|usr|tmp|opt)/\S*", text)
