"""Chat requests to a server of each family with tiles, and to servers whose models cannot be pruned."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.chat import Server, image_part, kept, text_of, url_of, user
from tests.support.foreign import write_foreign_checkpoint
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint
from vllm_vtprune_evaluation.photo import photograph
from vllm_vtprune_server.process import ServerFailed, running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify]

WIDE = (640, 320)
VISUAL_TOKENS = {"llava_next": 64 + 8 * 16 + 8, "internvl": 9 * 16}
"""Of a picture twice as wide as high, with squares of 112 pixels: newlines included, thumbnail included."""


def serving(checkpoint: Path, log: Path, *more: str) -> Iterator[Server]:
    options = "--served-model-name model --dtype float32 --max-model-len 2048 --enforce-eager".split()
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with running_server([str(checkpoint), *more, *options], environment=environment, log=log) as url:
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
    assert kept(answer)[0] == (20 + 8 if family == "llava_next" else 20)
    assert (second["visual_tokens"], second["kept_tokens"], second["method"]) == (visual, visual, "none")
    assert answer["usage"]["prompt_tokens_details"]["vtprune"] == {
        "visual_tokens": 2 * visual,
        "kept_tokens": sum(kept(answer)),
    }
    unpruned = served.ask(messages=[user("Where is the flag?", pruned, whole)])
    saved = unpruned["usage"]["prompt_tokens"] - answer["usage"]["prompt_tokens"]
    assert saved == visual - kept(answer)[0]


def test_a_stream(server: tuple[str, Server], picture: Image.Image) -> None:
    family, served = server
    asked = {
        "messages": [user("Where is the flag?", url_of(picture))],
        "pruning": {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 1}},
    }
    events = served.stream(**asked)
    [image] = events[-1]["pruning"]["images"]
    assert image["visual_tokens"] == VISUAL_TOKENS[family]
    assert 0 < image["kept_tokens"] < image["visual_tokens"]
    assert 0.9 <= image["energy"] < 1
    assert image["bypass_reason"] is None
    whole = served.ask(**asked)
    assert whole["pruning"]["images"] == [{**image, "cached": True}]
    assert text_of(events) == whole["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign_checkpoint(tmp_path_factory.mktemp("foreign") / "model")


def test_a_foreign_model_is_served_unpruned(foreign: Path, tmp_path: Path) -> None:
    """Qwen2-VL, no class of which is ours: vLLM's own processor serves it, and its images and videos are counted."""
    first, second = (url_of(photograph().resize(size)) for size in ((224, 280), (336, 112)))
    for server in serving(foreign, tmp_path / "log", "--pruning-default", "off"):
        message = user("Where is the flag?", first, image_part(second, pruning=False))
        answer = server.ask(messages=[message], pruning="fast")
        reports = [(image["visual_tokens"], image["bypass_reason"]) for image in answer["pruning"]["images"]]
        assert reports == [(8 * 10, "unsupported_model"), (12 * 4, None)]
        assert kept(answer) == [8 * 10, 12 * 4]
        plain = server.ask(messages=[message])
        assert plain["choices"][0]["message"] == answer["choices"][0]["message"]
        assert plain["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] > 8 * 10 + 12 * 4
        assert [image["bypass_reason"] for image in plain["pruning"]["images"]] == [None, None]
        events = server.stream(messages=[message], pruning="fast")
        assert events[-1]["pruning"]["images"] == answer["pruning"]["images"]
        text = server.ask(messages=[user("Why?")], pruning="fast")
        assert text["pruning"]["images"] == []
        refused = server.post({"messages": [message], "pruning": {"method": "no such"}})
        assert refused.status_code == 400
        assert server.get("/v1/pruning").json()["vision_encoder"] is None
        assert server.metrics()["vtprune:build_info|placement=none"] == 1
        log = server.log.read_text()
        assert "has the architecture Qwen2VLForConditionalGeneration, which cannot be pruned: it is served" in log
        assert "is served UNPRUNED" in log


def test_a_foreign_model_is_refused_where_the_default_prunes(foreign: Path, tmp_path: Path) -> None:
    expected = (
        "has the architecture Qwen2VLForConditionalGeneration, which cannot be pruned, but --pruning-default asks for "
        "it; expected one of Llava"
    )
    with pytest.raises(ServerFailed, match=re.escape(expected)):
        next(serving(foreign, tmp_path / "log", "--pruning-default", "balanced"))
    assert "Traceback" not in (tmp_path / "log").read_text()
