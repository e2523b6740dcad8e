"""Which tokens were kept: `return_kept` in chat requests, and `POST /v1/pruning/plan`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.chat import (
    VISUAL_TOKENS,
    Body,
    Server,
    by_energy,
    fresh_picture,
    fresh_url,
    image_part,
    kept,
    tokens,
    url_of,
    user,
)
from tests.support.rendering import endpoint
from vllm_vtprune.plugin.inspection import plan_of, pruning_processor
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint
from vllm_vtprune_evaluation.photo import photograph

pytestmark = pytest.mark.engine

QUESTION = "Where is the dog?"
REASON = "return_kept asks for positions, which the engine does not report"


def positions(runs: Iterable[list[int]]) -> list[int]:
    return [index for start, length in runs for index in range(start, start + length)]


def image_of(answer: Body) -> Body:
    [image] = answer["pruning"]["images"]
    return image


# --- return_kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [tokens(50), by_energy(50), tokens(50, method="fastervlm"), tokens(50, method="tome")],
    ids=["tokens", "energy", "cls", "merging"],
)
def test_the_report_holds_the_positions_that_inspect_draws(server: Server, policy: Body) -> None:
    picture = photograph()
    processor = pruning_processor(str(tiny_checkpoint()), "float32")
    report, plan, _ = plan_of(processor, picture, PruningPolicy.parse(policy), QUESTION)
    request = {"messages": [user(QUESTION, url_of(picture))], "pruning": {**policy, "return_kept": True}}
    for _ in range(2):  # the second from the caches
        image = image_of(server.ask(**request))
        assert positions(image["kept"]["runs"]) == plan.kept.tolist()
        assert image["kept"] == {
            "grid": [24, 24],
            "runs": image["kept"]["runs"],
            "tiles": None,
            "view": [0.0, 0.0, 1.0, 1.0],
        }
        assert (image["kept_tokens"], image["placement"]) == (50, "api")
        assert image["nouns"] == list(report.nouns)
    assert image["cached"] is True


def test_the_positions_are_those_of_the_answer(server: Server) -> None:
    """Another placement, the same tokens: the model says the same."""
    request: Body = {"messages": [user(QUESTION, fresh_url())], "max_tokens": 12}
    without = server.ask(**request, pruning=tokens(60))
    having = server.ask(**request, pruning={**tokens(60), "return_kept": True})
    assert image_of(without)["kept"] is None
    assert (image_of(without)["placement"], image_of(without)["placement_reason"]) == ("engine", None)
    assert (image_of(having)["placement"], image_of(having)["placement_reason"]) == ("api", REASON)
    assert having["choices"] == without["choices"]
    assert having["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    # a request after it, without the option
    again = server.ask(**request, pruning=tokens(60))
    assert (image_of(again)["kept"], image_of(again)["placement"]) == (None, "engine")


def test_in_a_stream_the_header_stays_as_it_is(server: Server) -> None:
    body = {"messages": [user(QUESTION, fresh_url())], "pruning": {"preset": "fast", "return_kept": True}}
    events = server.stream(**body)
    assert len(positions(image_of(events[-1])["kept"]["runs"])) == 64
    header = server.post(body).headers["x-vtprune"]
    assert header == "method=resprune, preset=fast, images=1, visual=576, kept=64"


@pytest.mark.parametrize(
    ("pruning", "model", "preset", "count"),
    [
        ({"preset": "thumbnail", "return_kept": True}, None, "thumbnail", 24),
        ({"preset": "thumbnail", "return_kept": False}, None, "thumbnail", 24),
        ({"preset": "thumbnail"}, None, "thumbnail", 24),
        ({"return_kept": True}, "llava@thumbnail", "thumbnail", 24),
        ({"return_kept": True}, None, None, 96),
        ({}, None, None, 96),
        ({"preset": None}, "llava@thumbnail", "thumbnail", 24),
        ({"preset": "off", "return_kept": True}, None, "off", VISUAL_TOKENS),
    ],
)
def test_the_option_goes_with_every_way_to_name_a_policy(
    server: Server, pruning: Body, model: str | None, preset: str | None, count: int
) -> None:
    body = {"messages": [user(QUESTION, fresh_url())], "pruning": pruning, "model": model or server.model}
    answer = server.ask(**body)
    assert answer["pruning"]["preset"] == preset
    image = image_of(answer)
    assert image["kept_tokens"] == count
    asked = pruning.get("return_kept", False) and count < VISUAL_TOKENS
    assert (image["kept"] is not None) == asked
    if asked:
        assert len(positions(image["kept"]["runs"])) == count


def test_beside_images(server: Server) -> None:
    own = {**tokens(20), "return_kept": True}
    images = [
        image_part(fresh_url(), pruning=own),
        image_part(fresh_url(), pruning={"return_kept": True}),
        image_part(fresh_url(), pruning="fast"),
    ]
    answer = server.ask(messages=[user(QUESTION, *images)], pruning=tokens(30))
    assert kept(answer) == [20, 30, 64]
    runs = [image["kept"] and len(positions(image["kept"]["runs"])) for image in answer["pruning"]["images"]]
    assert runs == [20, 30, None]
    answer = server.ask(messages=[user(QUESTION, *images)], pruning={"return_kept": True})
    runs = [len(positions(image["kept"]["runs"])) for image in answer["pruning"]["images"]]
    assert runs == kept(answer) == [20, 96, 64], "what the request asks for holds for all of its images"


def test_an_image_under_a_uuid_has_no_known_view(server: Server) -> None:
    policy = {**tokens(20), "return_kept": True}
    named = image_part(url_of(photograph()), uuid="kept-photograph")
    first = image_of(server.ask(messages=[user(QUESTION, named)], pruning=policy))
    recalled = image_part(None, uuid="kept-photograph")
    again = image_of(server.ask(messages=[user(QUESTION, recalled)], pruning=policy))
    assert again["kept"] == {**first["kept"], "view": None}


def test_the_view_is_what_the_encoder_sees(server: Server) -> None:
    """CLIP's image processor crops to the centre square."""
    wide = url_of(fresh_picture().resize((96, 48)))
    image = image_of(server.ask(messages=[user(QUESTION, wide)], pruning={**tokens(20), "return_kept": True}))
    assert image["kept"]["view"] == [0.0, 0.25, 1.0, 0.75]


@pytest.mark.parametrize(
    ("pruning", "param", "message"),
    [
        ({"return_kept": "yes"}, "pruning.return_kept", '"yes" is not accepted; expected true or false.'),
        ({"preset": "fst"}, "pruning.preset", '"fst" is not accepted (did you mean fast?); expected one of off'),
        ({"preset": ["fast"]}, "pruning.preset", "['fast'] is not accepted; expected one of off"),
        (
            {"preset": "fast", "method": "last", "return_kept": True},
            "pruning.method",
            "method given beside a preset, which is a whole policy; expected no field of a policy beside preset.",
        ),
        ({"budget": {"threshold": 2}, "return_kept": True}, "pruning.budget.threshold", "2 is not accepted"),
    ],
)
def test_mistakes(server: Server, pruning: Body, param: str, message: str) -> None:
    for path in ("/v1/chat/completions", "/v1/pruning/plan"):
        response = server.post({"messages": [user(QUESTION, fresh_url())], "pruning": pruning}, path)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"{param}: {message}"), error


def test_a_server_that_selects_in_its_engine_refuses() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTPRUNE_PLACEMENT", "engine")
        with endpoint(tiny_checkpoint()) as served:
            for pruning in ({**tokens(9), "return_kept": True}, {"return_kept": True}):
                error = served.error({"messages": [user(QUESTION, fresh_url())], "pruning": pruning})
                assert (error["param"], error["message"]) == (
                    "pruning.return_kept",
                    f"pruning.return_kept: {REASON}, and this server selects in its engine only; expected false.",
                )
            beside = image_part(fresh_url(), pruning={"return_kept": True})
            error = served.error({"messages": [user(QUESTION, beside)]})
            assert error["param"] == "messages.0.content.0.pruning.return_kept"
            body = {"model": "model", "messages": [user(QUESTION, fresh_url())]}
            refused = served.client.post("/v1/pruning/plan", json=body)
            assert refused.status_code == 400
            assert "this server selects in its engine only" in refused.json()["error"]["message"]


def test_tiles(tmp_path: Path) -> None:
    """LLaVA-NeXT reads the overview, then a canvas of all tiles with newlines, which are not counted."""
    checkpoint = write_llava_next_checkpoint(tmp_path / "model", image_size=112)
    with endpoint(checkpoint) as served:
        wide = url_of(photograph().resize((640, 320)))
        body = {"messages": [user("Where is the flag?", wide)], "pruning": {**tokens(20), "return_kept": True}}
        [image] = served.post(body).json()["pruning"]["images"]
    assert image["kept"]["grid"] is None
    overview, canvas = image["kept"]["tiles"]
    assert (overview["grid"], overview["box"]) == ([8, 8], None)
    assert (canvas["grid"], canvas["box"]) == ([8, 16], [0.0, 0.0, 1.0, 1.0])
    cells = [*positions(overview["runs"]), *(64 + cell for cell in positions(canvas["runs"]))]
    assert positions(image["kept"]["runs"]) == cells
    assert len(cells) == 20
    assert image["kept_tokens"] == 20 + 8


# --- the plan -------------------------------------------------------------------------------------------------------


def plan(server: Server, **body: Any) -> Body:
    response = server.post(body, "/v1/pruning/plan")
    assert response.status_code == 200, response.text
    return response.json()


def test_a_plan_says_what_a_chat_completion_would(server: Server) -> None:
    images = [image_part(fresh_url()), image_part(fresh_url(), pruning={**tokens(30), "method": "divprune"})]
    body: Body = {"messages": [user(QUESTION, *images)], "pruning": "balanced", "max_tokens": 12, "temperature": 0}
    before = server.metrics()
    planned = plan(server, **body)
    assert server.metrics().since(before, "vllm:prompt_tokens_total", "vtprune:requests_total") == (0, 0)
    asked = server.ask(**body)
    assert planned["object"] == "pruning.plan"
    assert planned["prompt_tokens"] == asked["usage"]["prompt_tokens"]
    for left, right in zip(planned["pruning"]["images"], asked["pruning"]["images"], strict=True):
        assert len(positions(left["kept"]["runs"])) == left["kept_tokens"]
        differing = {"kept", "placement", "placement_reason"}
        assert {**left, **{key: right[key] for key in differing}} == right
    assert planned["pruning"]["preset"] == asked["pruning"]["preset"] == "balanced"
    timings = planned["pruning"]["timings_ms"]
    assert timings["encode"] > 0
    assert timings["ttft"] is None
    assert timings["total"] > 0
    again = plan(server, **{**body, "pruning": {"budget": {"type": "ratio", "keep": 0.3}}})
    assert again["pruning"]["timings_ms"]["encode"] is None, "features are cached"
    assert kept(again) == [173, 30]


def test_a_plan_does_not_change_answers(server: Server) -> None:
    """What a plan processes is not what vLLM believes that its engine holds."""
    for policy in (tokens(40), by_energy(40), False):
        body: Body = {"messages": [user(QUESTION, fresh_url())], "pruning": policy, "max_tokens": 8, "temperature": 0}
        plan(server, **body)
        asked, again = server.ask(**body), server.ask(**body)
        assert asked["choices"][0]["message"] == again["choices"][0]["message"]
        assert kept(asked) == [40 if policy else VISUAL_TOKENS]


def test_a_plan_without_a_policy_follows_the_model_s_alias_and_the_default(server: Server) -> None:
    body: Body = {"messages": [user(QUESTION, fresh_url())]}
    assert kept(plan(server, **body)) == [96]
    assert kept(plan(server, **body, model="llava@thumbnail")) == [24]
    unpruned = plan(server, **body, pruning=False)
    assert kept(unpruned) == [VISUAL_TOKENS]
    assert image_of(unpruned)["kept"] is None
    missing = server.post({**body, "model": "llava@none"}, "/v1/pruning/plan")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [user(QUESTION, "data:image/png;base64,AAAA")]}, "messages.0.content.0.image_url"),
        ({"messages": [user(QUESTION, "https://example.com/cat.png")]}, "messages.0.content.0.image_url"),
        ({"messages": [user(QUESTION, *[url_of(Image.new("RGB", (9, 9)))] * 4)]}, "messages.0.content.3.image_url"),
        ({"messages": [user("<image>", fresh_url())]}, "messages.0.content"),
        ({"messages": [user(QUESTION)], "prunning": "fast"}, "prunning"),
        ({}, "messages"),
    ],
    ids=["not an image", "not allowed", "too many", "placeholder", "misspelt", "nothing"],
)
def test_a_plan_refuses_what_a_chat_completion_does(server: Server, body: Body, param: str) -> None:
    refused = [server.post(body, path) for path in ("/v1/pruning/plan", "/v1/chat/completions")]
    assert [response.status_code for response in refused] == [400, 400]
    assert refused[0].json() == refused[1].json()
    assert refused[0].json()["error"]["param"].startswith(param)


def unknown(example: Body, answer: Body, at: str = "") -> list[str]:
    """Paths in an example that an answer lacks. FastAPI leaves what is null out of examples."""
    missing = [f"{at}{key}" for key in example if key not in answer]
    for key, inner in example.items():
        other = answer.get(key)
        if isinstance(inner, list) and isinstance(other, list) and isinstance(inner[0], dict):
            inner, other = inner[0], other[0]
        if isinstance(inner, dict) and isinstance(other, dict):
            missing += unknown(inner, other, f"{at}{key}.")
    return missing


def test_the_examples_in_the_schema_are_answers(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    body: Body = {"messages": [user("Where is the bus?", fresh_url())], "pruning": "fast"}
    for path in ("/v1/chat/completions", "/v1/pruning/plan"):
        example = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["example"]
        answer = server.post(body, path).json()
        assert unknown(example, answer) == []
        assert example["pruning"]["images"][0]["visual_tokens"] == VISUAL_TOKENS
        assert PruningPolicy.parse({"budget": example["pruning"]["budget"]}) == PruningPolicy.parse("fast")
