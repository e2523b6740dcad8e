"""`GET /v1/pruning`: what a client can find out before it asks."""

import json
import re
import subprocess
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.chat import Server, by_energy, fresh_url, kept, user
from tests.support.rendering import endpoint
from vllm_vtprune import __version__
from vllm_vtprune.plugin.families.llava import WITH_CLIP
from vllm_vtprune.plugin.placement import EnginePlacement
from vllm_vtprune.policy import BUILTIN_PRESETS, PolicyError, PruningPolicy
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune.text import text_pipeline_name
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_server.policies import Policies, fixed_counts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def information(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = server.get("/v1/pruning").json()
    return answer


def test_it_lists_every_method_with_needs_and_cost(information: dict[str, Any]) -> None:
    methods = {method["name"]: method for method in information["methods"]}
    assert list(methods) == list(METHODS)
    assert methods["fastervlm"]["needs"] == ["cls_attention"]
    assert methods["fastervlm"]["cost"] == "ranking"
    assert methods["resprune"]["cost"] == "greedy"
    assert "alpha" in methods["resprune"]["parameters"]
    assert [name for name, method in methods.items() if method["own_count"]] == ["prumerge", "trim"]
    unavailable = [name for name, method in methods.items() if not method["available"]]
    assert unavailable == ["resize"], "this checkpoint's encoder is CLIP, at a fixed resolution"


def test_its_presets_are_policies_that_a_request_may_send(server: Server, information: dict[str, Any]) -> None:
    assert set(information["presets"]) == {*BUILTIN_PRESETS, "thumbnail"}
    messages = [user("Where is the dog?", fresh_url())]
    for name, policy in information["presets"].items():
        assert kept(server.ask(messages=messages, pruning=name)) == kept(server.ask(messages=messages, pruning=policy))


def test_it_tells_the_default(server: Server, information: dict[str, Any], default_keep: int) -> None:
    assert information["default_preset"] is None
    assert information["default"]["budget"] == {"type": "tokens", "keep": default_keep}
    answer = server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=information["default"])
    assert kept(answer) == [default_keep]


def test_its_aliases_are_models(server: Server, information: dict[str, Any], served_names: tuple[str, ...]) -> None:
    listed = [card["id"] for card in server.get("/v1/models").json()["data"]]
    assert information["models"] == list(served_names)
    assert listed == [*information["models"], *information["aliases"]]
    assert information["aliases"]["llava@thumbnail"] == "thumbnail"


def test_a_model_that_is_named_like_an_alias_is_listed_once_and_is_what_it_says() -> None:
    names = ("first", "first@fast", "a/b")
    with endpoint(tiny_checkpoint(), names=names) as served:
        listed = [card["id"] for card in served.client.get("/v1/models").json()["data"]]
        assert listed[: len(names)] == list(names)
        assert len(listed) == len(set(listed))
        assert "first@fast@fast" in listed
        answer = served.post({"model": "first@fast", "messages": [user("Where?", fresh_url())]}).json()
        assert kept(answer) == [8], "as the server's default says"
        for name, parent in (("first@fast", None), ("a/b", None), ("a/b@fast", "a/b"), ("first@off", "first")):
            assert served.client.get(f"/v1/models/{name}").json()["parent"] == parent


def test_it_tells_what_runs(server: Server) -> None:
    server.ask(messages=[user("Where is the dog?", fresh_url())], pruning=by_energy(64))  # loads the encoder
    information = server.get("/v1/pruning").json()
    vision_encoder = information["vision_encoder"]
    assert (vision_encoder["weights"], vision_encoder["dtype"]) == ("checkpoint", "float32")
    assert vision_encoder["device"].startswith(("cpu", "cuda"))
    assert vision_encoder["parameters"] > 0
    assert vision_encoder["shared"] is False, "there is one API process"
    assert information["text_pipeline"] == text_pipeline_name()
    versions = {"vllm_vtprune": __version__} | {name: version(name) for name in ("torch", "transformers")}
    assert versions.items() <= information["versions"].items()
    assert information["versions"]["vllm"].startswith("0.32")


def test_the_first_request_that_prunes_loads_the_encoder() -> None:
    with endpoint(tiny_checkpoint()) as served:

        def parameters() -> int | None:
            vision_encoder = served.client.get("/v1/pruning").json()["vision_encoder"]
            assert (vision_encoder["weights"], vision_encoder["dtype"]) == ("checkpoint", "bfloat16")
            loaded: int | None = vision_encoder["parameters"]
            return loaded

        messages = [user("Where?", fresh_url())]
        assert parameters() is None
        served.post({"messages": messages, "pruning": False})
        assert parameters() is None
        assert kept(served.post({"messages": messages}).json()) == [8]
        assert parameters() is None, "the engine selects"
        assert kept(served.post({"messages": messages, "pruning": by_energy(9)}).json()) == [9]
        assert (parameters() or 0) > 0


@pytest.mark.parametrize(
    ("default", "presets", "placements"),
    [
        (None, {}, set()),
        ("off", {}, set()),
        ("fast", {}, {"engine"}),
        ("balanced", {}, {"api"}),
        ("fast", {"mine": {"method": "divprune"}}, {"api", "engine"}),
        (None, {"mine": {"method": "none"}}, set()),
    ],
)
def test_the_encoder_is_loaded_at_the_start_where_an_operator_s_policy_needs_it(
    default: Any, presets: dict[str, Any], placements: set[str]
) -> None:
    own = {name: PruningPolicy.parse(value) for name, value in presets.items()}
    engine = EnginePlacement("auto")
    place = partial(engine.place, family=WITH_CLIP)
    processor: Any = SimpleNamespace(family=WITH_CLIP, place=place, engine_placement=EnginePlacement("auto"))
    assert Policies.of(default, own).placements(processor) == placements


def test_a_default_that_the_engine_cannot_follow_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that it cannot follow do not: they are not among those that clients may name."""
    monkeypatch.setenv("VTPRUNE_PLACEMENT", "engine")
    place = partial(EnginePlacement("engine").place, family=WITH_CLIP)
    processor: Any = SimpleNamespace(family=WITH_CLIP, place=place, engine_placement=EnginePlacement("auto"))
    mine = {"mine": PruningPolicy.parse("quality")}
    policies = Policies.of("fast", mine, fixed_counts=fixed_counts())
    assert policies.placements(processor) == {"engine"}
    assert list(policies.available) == ["off", "fast"]
    with pytest.raises(PolicyError, match=r'--pruning-default: a budget of the type "energy" depends on features'):
        Policies.of("balanced", fixed_counts=fixed_counts())


def test_an_engine_that_selects_alone() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VTPRUNE_PLACEMENT", "engine")
        with endpoint(tiny_checkpoint()) as served:
            information = served.client.get("/v1/pruning").json()
            assert (information["placement"], information["vision_encoder"]) == ("engine", None)
            messages = [user("Where?", fresh_url())]
            [image] = served.post({"messages": messages}).json()["pruning"]["images"]
            assert (image["kept_tokens"], image["placement"]) == (8, "engine")
            refused = served.post({"messages": messages, "pruning": "balanced"})
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["param"] == "pruning"
            assert error["message"] == (
                'pruning: a budget of the type "energy" depends on features and cannot be used with '
                '--pruning-placement engine; expected a budget of the type "tokens" or "ratio".'
            )
            assert list(information["presets"]) == ["off", "fast"], "those that it follows"


def test_its_schema_is_typed(server: Server) -> None:
    document = server.get("/openapi.json").json()
    answer = document["paths"]["/v1/pruning"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/PruningInformation"}
    assert {"Method", "VisionEncoder", "Versions"} <= set(document["components"]["schemas"])


def test_a_ready_server_says_what_it_serves_and_how_to_ask(server: Server) -> None:
    log = server.log.read_text()
    assert f"vllm-vtprune {__version__} prunes images of {server.model}. Default: " in log
    [command] = re.findall(r"^curl http.*$", log, re.MULTILINE)
    answer = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, check=True, timeout=120)
    assert kept(json.loads(answer.stdout)) == [64]
