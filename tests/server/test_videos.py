"""Videos beside images, over HTTP: images are pruned, videos pass, and the report says so in the prompt's order."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.support.chat import Body, Server, image_part, url_of
from tests.support.images import sample_images
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.qwen2_5_vl import write_qwen2_5_vl_checkpoint
from vllm_vtprune_server.process import running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify]

WRITE = {
    "qwen2_5_vl": write_qwen2_5_vl_checkpoint,
    "internvl": partial(write_internvl_checkpoint, image_size=112),
}
TOKENS = {  # of a video of 8 frames of 112 x 140 pixels, and of two images of 224 x 280 and 336 x 112 pixels
    "qwen2_5_vl": {"video": 2 * 4 * 5, "first": 8 * 10, "second": 12 * 4},  # two frames a second, two of them a step
    "internvl": {"video": 8 * 16, "first": (3 * 4 + 1) * 16, "second": (3 + 1) * 16},
}
ORDERS = (
    ("video", "first"),
    ("first", "video"),
    ("video", "first", "second"),
    ("first", "video", "second"),
    ("video",),
)
KEEP = 20
POLICY = {"budget": {"type": "tokens", "keep": KEEP}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Body]:
    """Content parts of a message, by the names that `ORDERS` has for them."""
    file = tmp_path_factory.mktemp("video") / "square.mp4"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"mp4v"), 4, (112, 140))
    for index in range(8):
        frame = np.zeros((140, 112, 3), dtype=np.uint8)
        frame[10 * index : 10 * index + 40, 10:60] = (30, 30 * index, 200)
        writer.write(frame)
    writer.release()
    video = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    first, second = sample_images(2)
    return {
        "video": {"type": "video_url", "video_url": {"url": video}},
        "first": image_part(url_of(first.resize((224, 280)))),
        "second": image_part(url_of(second.resize((336, 112)))),
    }


def asked(parts: Mapping[str, Body], order: Sequence[str], **fields: Any) -> Body:
    """A request about media in that order."""
    content = [*(parts[name] for name in order), {"type": "text", "text": "Where is the flag?"}]
    return {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 5, **fields}


def summary_of(answer: Body) -> tuple[Any, Any, int]:
    [choice] = answer["choices"]
    return choice["message"]["content"], choice["logprobs"], answer["usage"]["prompt_tokens"]


@pytest.fixture(scope="module", params=WRITE)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / request.param
    return WRITE[request.param](folder, dtype="float32")


def serving(model: Sequence[str], log: Path, *command: str, **environment: str) -> Iterator[Server]:
    options = [*model, *"--served-model-name model --dtype float32 --max-model-len 2048 --enforce-eager".split()]
    options += ["--no-enable-prefix-caching"]  # so that what was asked before is of no account
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    choice = {"command": command} if command else {}
    with running_server(options, environment=environment, log=log, **choice) as url:
        yield Server(url, log, model="model")


@pytest.fixture(scope="module")
def stock(checkpoint: Path, parts: Mapping[str, Body]) -> list[tuple[Any, Any, int]]:
    """What vLLM's own server says, without the plugin, in each order. It has ended when ours starts."""
    command = ("-m", "vllm.entrypoints.openai.api_server")
    for server in serving(
        ["--model", str(checkpoint)], checkpoint.with_suffix(".stock.log"), *command, VLLM_PLUGINS=""
    ):
        return [summary_of(server.ask(**asked(parts, order))) for order in ORDERS]
    raise AssertionError


@pytest.fixture(scope="module")
def server(checkpoint: Path, stock: object) -> Iterator[Server]:
    yield from serving([str(checkpoint)], checkpoint.with_suffix(".log"))


def test_without_pruning_the_answer_is_stock_vllms(
    server: Server, stock: list[tuple[Any, Any, int]], parts: Mapping[str, Body]
) -> None:
    for fields in ({}, {"pruning": False}):
        answers = [summary_of(server.ask(**asked(parts, order, **fields))) for order in ORDERS]
        assert answers == stock
    assert len({content for content, _, _ in stock}) > 1, "answers depend on what was asked"


def test_images_are_pruned_and_videos_pass_in_every_order(
    server: Server, stock: list[tuple[Any, Any, int]], checkpoint: Path, parts: Mapping[str, Body]
) -> None:
    counts = TOKENS[checkpoint.name]
    for order, (_, _, unpruned) in zip(ORDERS, stock, strict=True):
        answer = server.ask(**asked(parts, order, pruning=POLICY))
        reports = [
            (entry["method"], entry["visual_tokens"], entry["kept_tokens"], entry["bypass_reason"])
            for entry in answer["pruning"]["images"]
        ]
        assert reports == [
            ("resprune", counts[name], counts[name], "unsupported_modality")
            if name == "video"
            else ("resprune", counts[name], KEEP, None)
            for name in order
        ]
        saved = sum(counts[name] - KEEP for name in order if name != "video")
        assert answer["usage"]["prompt_tokens"] == unpruned - saved
        streamed = server.stream(**asked(parts, order, pruning=POLICY))
        assert [entry["kept_tokens"] for entry in streamed[-1]["pruning"]["images"]] == [
            kept for _, _, kept, _ in reports
        ]


def test_a_video_that_is_not_taken_is_named_by_its_field(server: Server, parts: Mapping[str, Body]) -> None:
    for url, problem in (
        ("https://example.com/cat.mp4", "is on the web, and --allowed-media-domains is not set"),
        ("data:video/mp4;base64,@", "does not hold valid base64"),
        ("data:video/mp4;base64,QUJD", "could not be loaded"),
    ):
        body = asked({**parts, "bad": {"type": "video_url", "video_url": {"url": url}}}, ("first", "bad"))
        response = server.post({**body, "pruning": POLICY})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == "messages.0.content.1.video_url"
        assert error["message"] == (
            f"messages.0.content.1.video_url: {url!r} {problem}; "
            "expected data:video/<format>;base64,<the file's bytes in base64>."
        )
