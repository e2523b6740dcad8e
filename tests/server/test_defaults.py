"""Where a policy may stand, and which of several counts: beside the image, in the request, in the model's name, or as
the server's default."""

import httpx
import pytest

from tests.support.chat import VISUAL_TOKENS, Body, Server, fresh_url, image_part, kept, user

pytestmark = pytest.mark.engine

BESIDE, FIELD, ALIAS, DEFAULT = 11, 64, 24, 96
"""Tokens that the policy at each place keeps."""


def error_of(response: httpx.Response, status: int) -> Body:
    assert response.status_code == status, response.text
    error: Body = response.json()["error"]
    assert error["code"] == status
    return error


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("field", [True, False])
@pytest.mark.parametrize("alias", [True, False])
def test_the_policy_nearest_to_the_image_counts(server: Server, beside: bool, field: bool, alias: bool) -> None:
    own = {"pruning": {"budget": {"type": "tokens", "keep": BESIDE}}} if beside else {}
    body: Body = {"messages": [user("Where is the dog?", image_part(fresh_url(), **own))]}
    body |= {"pruning": "fast"} if field else {}
    body |= {"model": f"{server.model}@thumbnail"} if alias else {}
    answer = server.ask(**body)
    assert kept(answer) == [BESIDE if beside else FIELD if field else ALIAS if alias else DEFAULT]
    assert answer["pruning"]["preset"] == ("fast" if field else "thumbnail" if alias else None)
    assert answer["model"] == server.model


@pytest.mark.parametrize("off", [False, "off", {"method": "none"}])
def test_pruning_can_be_switched_off_at_every_place(server: Server, off: object) -> None:
    images = [image_part(fresh_url(), pruning=off), image_part(fresh_url())]
    messages = [user("Compare them.", *images)]
    alias = f"{server.model}@thumbnail"
    assert kept(server.ask(messages=messages, model=alias)) == [VISUAL_TOKENS, ALIAS]
    assert kept(server.ask(messages=messages, model=alias, pruning=off)) == [VISUAL_TOKENS] * 2
    assert kept(server.ask(messages=messages, model=f"{server.model}@off")) == [VISUAL_TOKENS] * 2


def test_a_null_says_nothing(server: Server) -> None:
    messages = [user("Where is the dog?", image_part(fresh_url(), pruning=None))]
    assert kept(server.ask(messages=messages, model=f"{server.model}@thumbnail", pruning=None)) == [ALIAS]


# --- presets of the operator ----------------------------------------------------------------------------------------


def test_presets_from_the_file_are_there_and_replace_those_of_the_package(server: Server) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    assert kept(server.ask(messages=messages, pruning="thumbnail")) == [ALIAS]
    replaced = server.ask(messages=messages, pruning="quality")
    assert (kept(replaced), replaced["pruning"]["method"]) == ([400], "uniform")
    assert kept(server.ask(messages=[user("Where?", image_part(fresh_url(), pruning="thumbnail"))])) == [ALIAS]


def test_an_unknown_preset_is_answered_with_all_that_exist(server: Server) -> None:
    error = error_of(server.post({"messages": [user("Where?", fresh_url())], "pruning": "thumbnial"}), 400)
    assert error["param"] == "pruning"
    assert "off, quality, balanced, fast, document, thumbnail" in error["message"]


# --- aliases --------------------------------------------------------------------------------------------------------


def test_every_served_name_has_every_preset(server: Server, served_names: tuple[str, ...]) -> None:
    listed = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    presets = ["off", "quality", "balanced", "fast", "document", "thumbnail"]
    aliases = [f"{name}@{preset}" for name in served_names for preset in presets]
    assert list(listed) == [*served_names, *aliases], "models before their aliases"
    for alias in aliases:
        name = alias.split("@")[0]
        assert listed[alias]["parent"] == name
        assert listed[alias]["root"] == listed[name]["root"]
        assert listed[alias]["max_model_len"] == listed[name]["max_model_len"]
    for name in served_names:
        answer = server.ask(model=f"{name}@thumbnail", messages=[user("Where is the dog?", fresh_url())])
        assert kept(answer) == [ALIAS]


def test_an_alias_works_in_a_stream(server: Server) -> None:
    chunks = server.stream(model=f"{server.model}@fast", messages=[user("Where is the dog?", fresh_url())])
    assert kept(chunks[-1]) == [FIELD]


@pytest.mark.parametrize("stream", [False, True])
def test_an_alias_with_an_unknown_preset(server: Server, stream: bool) -> None:
    body = {"model": "llava@fsat", "messages": [user("Where is the dog?", fresh_url())], "stream": stream}
    error = error_of(server.post(body), 404)
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert "`llava@fsat` does not exist" in error["message"]
    assert "llava@PRESET with one of off, quality, balanced, fast, document, thumbnail" in error["message"]


@pytest.mark.parametrize("model", ["other@fast", "@fast", "other", "llava@"])
def test_an_alias_of_a_model_that_is_not_served(server: Server, model: str) -> None:
    error = error_of(server.post({"model": model, "messages": [user("Where is the dog?")]}), 404)
    assert error["param"] == "model"


QUESTION = [{"role": "user", "content": "Where is the dog?"}]
OTHER_ENDPOINTS: dict[str, Body] = {
    "/v1/completions": {"prompt": "The dog"},
    "/tokenize": {"messages": QUESTION},
}


@pytest.mark.parametrize("path", OTHER_ENDPOINTS)
def test_endpoints_that_do_not_prune_refuse_an_alias_and_say_why(server: Server, path: str) -> None:
    response = server.post({**OTHER_ENDPOINTS[path], "model": "llava@fast"}, path)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert "`llava@fast` names a pruning preset, and this endpoint does not prune; expected `llava`" in message
    assert server.post({**OTHER_ENDPOINTS[path], "model": "llava"}, path).status_code == 200, "without the preset"


def test_endpoints_that_do_not_prune_serve_images_unpruned(server: Server) -> None:
    """Though this server's default prunes."""
    url = fresh_url()
    before = server.metrics()
    counted = server.post({"messages": [user("Where?", url)]}, "/tokenize").json()["count"]
    assert counted > VISUAL_TOKENS
    assert server.metrics().since(before, "vtprune:visual_tokens_total") == (0,)
