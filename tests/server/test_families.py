"""One chat request to a server of each family with tiles, and one to a server whose model cannot be pruned."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.support.chat import Server, image_part, kept, url_of, user
from vllm_vtprune.demo.internvl import write_internvl_checkpoint
from vllm_vtprune.demo.llava_next import write_llava_next_checkpoint
from vllm_vtprune.demo.photo import photograph
from vllm_vtprune.demo.server import running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify]

WIDE = (640, 320)
VISUAL_TOKENS = {"llava_next": 64 + 8 * 16 + 8, "internvl": 9 * 16}
"""Of a picture twice as wide as high, with squares of 112 pixels: newlines included, thumbnail included."""


def serving(checkpoint: Path, log: Path) -> Iterator[Server]:
    options = ["--served-model-name", "model", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with running_server([str(checkpoint), *options], environment=environment, log=log) as url:
        yield Server(url, log, model="model")


@pytest.fixture(scope="module", params=VISUAL_TOKENS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    folder = tmp_path_factory.mktemp(request.param)
    write = {"llava_next": write_llava_next_checkpoint, "internvl": write_internvl_checkpoint}[request.param]
    for server in serving(write(folder / "model", image_size=112), folder / "log"):
        yield request.param, server


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return photograph().resize(WIDE)


def test_a_request_with_a_pruned_and_an_unpruned_image(server: tuple[str, Server], picture: Image.Image) -> None:
    family, served = server
    pruned, whole = image_part(url_of(picture)), image_part(url_of(picture.rotate(180)), pruning=False)
    answer = served.ask(
        messages=[user("Where is the flag?", pruned, whole)], pruning={"budget": {"type": "tokens", "keep": 20}}
    )
    visual = VISUAL_TOKENS[family]
    first, second = answer["pruning"]["images"]
    assert (first["visual_tokens"], first["nouns"], first["bypass_reason"]) == (visual, ["flag"], None)
    assert 20 <= kept(answer)[0] <= (28 if family == "llava_next" else 20)
    assert (second["visual_tokens"], second["kept_tokens"], second["method"]) == (visual, visual, "none")
    assert answer["usage"]["prompt_tokens_details"]["vtprune"] == {
        "visual_tokens": 2 * visual,
        "kept_tokens": sum(kept(answer)),
    }
    unpruned = served.ask(messages=[user("Where is the flag?", pruned, whole)])
    saved = unpruned["usage"]["prompt_tokens"] - answer["usage"]["prompt_tokens"]
    assert saved == visual - kept(answer)[0]


def test_a_stream(server: tuple[str, Server], picture: Image.Image) -> None:
    _, served = server
    events = served.stream(messages=[user("Where is the flag?", url_of(picture))], pruning="balanced")
    [image] = events[-1]["pruning"]["images"]
    assert 0 < image["kept_tokens"] <= image["visual_tokens"]
    assert image["energy"] >= 0.99 or image["kept_tokens"] == image["visual_tokens"]


@pytest.mark.skipif(not os.environ.get("VTPRUNE_VERIFY"), reason="another server; runs in make verify")
def test_a_model_that_cannot_be_pruned_is_served_with_the_reason(tmp_path: Path, picture: Image.Image) -> None:
    checkpoint = write_internvl_checkpoint(tmp_path / "model", image_size=112)
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["InternS1ForConditionalGeneration"]  # the same model under a name that is not ours
    (checkpoint / "config.json").write_text(json.dumps(config))
    for server in serving(checkpoint, tmp_path / "log"):
        answer = server.ask(messages=[user("Where is the flag?", url_of(picture))], pruning="fast")
        [image] = answer["pruning"]["images"]
        assert image["bypass_reason"] == "unsupported_model"
        assert image["kept_tokens"] == image["visual_tokens"] == VISUAL_TOKENS["internvl"]
        assert answer["pruning"]["method"] == "none"
        plain = server.ask(messages=[user("Where is the flag?", url_of(picture))])
        assert plain["choices"][0]["message"] == answer["choices"][0]["message"]
        assert plain["pruning"]["images"][0]["bypass_reason"] is None
        refused = server.post({"messages": [user("Why?", url_of(picture))], "pruning": {"method": "no such"}})
        assert refused.status_code == 400
        information = httpx.get(f"{server.url}/v1/pruning").json()
        assert information["tower"] is None
        assert not any(method["available"] for method in information["methods"])
        assert "served UNPRUNED" in server.log.read_text()
