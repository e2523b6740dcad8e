"""What a client may write, what it means, and what it is told when it is wrong."""

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.defaults import QWEN
from tests.support.samples import examples
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.policy import (
    BUILTIN_PRESETS,
    LLAVA,
    MAX_QUERY_CHARS,
    OFF,
    EnergyBudget,
    FamilyDefaults,
    PolicyError,
    PruningPolicy,
    preset_of,
)
from vllm_vtprune.selectors.resprune import ALPHA, ResPrune

DOCUMENTED = json.loads("""
{"method": "resprune",
 "budget": {"type": "energy", "threshold": 0.99, "min_tokens": 32, "max_tokens": null, "solver": "auto", "rank": 300,
            "power_iterations": 2},
 "text": {"scope": "message", "query": null, "clean": true, "modifiers": true},
 "gate": "auto", "alpha": null, "relevance": "max", "seed_token": "auto", "rank_by": "residual",
 "features": "projected", "importance": "auto", "sigma_d": null, "sigma_s": null, "radius": null, "correction": true,
 "distance": true, "similarity": true, "seed": 0, "crop_borders": false, "dedup": false}
""")


def test_documented_object_is_the_default() -> None:
    assert PruningPolicy.parse(DOCUMENTED) == PruningPolicy.parse({}) == PruningPolicy()
    assert PruningPolicy().model_dump() == {name: DOCUMENTED[name] for name in ResPrune.model_fields}


def test_short_forms() -> None:
    assert PruningPolicy.parse(False) == PruningPolicy.parse("off") == PruningPolicy.parse(None) == OFF
    assert not OFF.enabled
    default = PruningPolicy.parse("fast")
    assert PruningPolicy.parse(None, default=default) is default
    assert PruningPolicy.parse(False, default=default) == OFF
    assert PruningPolicy.parse(default) is default


@pytest.mark.parametrize("name", BUILTIN_PRESETS)
def test_presets_are_valid_and_survive_a_dump(name: str) -> None:
    policy = PruningPolicy.parse(name)
    assert PruningPolicy.parse(json.loads(json.dumps(policy.dump()))) == policy
    assert policy.resolve(LLAVA).selection_digest()


def test_own_presets_replace_the_built_in_ones() -> None:
    presets: dict[str, Any] = {"half": {"budget": {"type": "ratio", "keep": 0.5}}, "ready": OFF}
    assert PruningPolicy.parse("half", presets=presets).budget.model_dump() == {"type": "ratio", "keep": 0.5}
    assert PruningPolicy.parse("ready", presets=presets) is OFF
    with pytest.raises(PolicyError, match="half, ready"):
        PruningPolicy.parse("fast", presets=presets)


LONG = "x" * 100_000
WRONG: list[tuple[object, str, str]] = [
    # value, path below "pruning", what the message says
    (True, "", "true is not accepted; expected an object, false, or a preset: off, quality"),
    (5, "", "5 is not accepted"),
    ([], "", "[] is not accepted"),
    ("bogus", "", '"bogus" is not accepted'),
    (LONG, "", "... is not accepted"),
    ({"foo": 1}, "foo", "unknown field; expected one of method, budget, text"),
    ({"method": "respune"}, "method", '"respune" is not accepted (did you mean resprune?); expected one of none, '),
    ({"budget": {"type": "token"}}, "budget.type", '"token" is not accepted (did you mean tokens?); expected one of '),
    ({"text": {"scope": "lastturn"}}, "text.scope", '"lastturn" is not accepted (did you mean last_turn?); expected "'),
    ("Balnced", "", '"Balnced" is not accepted (did you mean balanced?); expected an object, false, or a preset: '),
    ("magic", "", '"magic" is not accepted; expected an object, false, or a preset: '),
    ({"metod": 1}, "metod", "unknown field (did you mean method?); expected one of method, budget, text"),
    ({"budget": {"Treshold": 1}}, "budget.Treshold", "unknown field (did you mean threshold?)"),
    ({1: 2}, "1", "unknown field"),
    ({LONG: LONG}, "x" * 64, "unknown field"),
    ({"a\ud800\n": 1}, "a\\ud800\\n", "unknown field"),
    ({"method": "bogus"}, "method", '"bogus" is not accepted; expected one of none, resprune, adaptprune, '),
    ({"method": None}, "method", "null is not accepted"),
    ({"method": LONG}, "method", "expected one of none"),
    ({"budget": None}, "budget", "an object whose type is one of energy, ratio, tokens, method"),
    ({"budget": []}, "budget", "an object whose type is"),
    ({"budget": {"type": "share"}}, "budget.type", '"share" is not accepted; expected one of energy, ratio'),
    ({"budget": {"type": ["energy"]}}, "budget.type", "not accepted"),
    ({"budget": {"zz": 1}}, "budget.zz", "unknown field; expected one of type, threshold"),
    ({"budget": {"keep": 0.5}}, "budget.keep", "keep belongs to budget type ratio or tokens"),
    ({"budget": {"type": "ratio", "threshold": 0.5, "keep": 1}}, "budget.threshold", "belongs to budget type energy"),
    ({"budget": {"type": "method", "keep": 5}}, "budget.keep", "this budget is of type method"),
    ({"budget": {"type": "ratio"}}, "budget.keep", "nothing given"),
    ({"budget": {"type": "tokens"}}, "budget.keep", "expected an integer from 1"),
    *(
        ({"budget": {"threshold": bad}}, "budget.threshold", "expected a number above 0 and at most 1")
        for bad in (0, -0.1, 1.0001, True, "0.9", None, float("nan"), float("inf"), 10**400, [0.9])
    ),
    *(
        ({"budget": {"type": "ratio", "keep": bad}}, "budget.keep", "expected a number above 0 and at most 1")
        for bad in (0, 1.5, True, "1/2", float("nan"))
    ),
    *(
        ({"budget": {"type": "tokens", "keep": bad}}, "budget.keep", "expected an integer from 1 to 1000000")
        for bad in (0, -1, 1.0, True, "64", 1_000_001, 2**200)
    ),
    ({"budget": {"min_tokens": 0}}, "budget.min_tokens", "0 is not accepted"),
    ({"budget": {"max_tokens": 0}}, "budget.max_tokens", "null or an integer"),
    ({"budget": {"min_tokens": 9, "max_tokens": 8}}, "budget.min_tokens", "max_tokens, which is 8"),
    ({"budget": {"max_tokens": 8}}, "budget.max_tokens", "min_tokens, whose default is 32"),
    ({"budget": {"solver": "svd"}}, "budget.solver", '"auto", "exact" or "rsvd"'),
    ({"budget": {"rank": 0}}, "budget.rank", "not accepted"),
    ({"budget": {"power_iterations": -1}}, "budget.power_iterations", "not accepted"),
    ({"budget": {"type": "method"}}, "budget.type", "(prumerge, trim), and resprune has none"),
    ({"text": "noun"}, "text", '"noun" is not accepted; expected an object with any of scope, query, clean'),
    ({"text": {"scope": "all"}}, "text.scope", '"message" or "last_turn"'),
    ({"text": {"clean": 1}}, "text.clean", "1 is not accepted; expected true or false"),
    ({"text": {"query": "x" * (MAX_QUERY_CHARS + 1)}}, "text.query", "at most 4096 characters"),
    ({"text": {"query": 5}}, "text.query", "null or a string"),
    ({"text": {"budget": 5}}, "text.budget", "unknown field; expected one of scope"),
    ({"gate": "sigmoid"}, "gate", '"sigmoid" is not accepted; expected "auto", "minmax" or "clip"'),
    *(({"alpha": bad}, "alpha", "null or a number from 0 to 16") for bad in (-1, 17, True, "1", float("nan"))),
    ({"relevance": "sum"}, "relevance", '"max", "mean" or "mean_token"'),
    ({"seed_token": 3}, "seed_token", "3 is not accepted"),
    ({"rank_by": "norm"}, "rank_by", '"residual" or "relevance"'),
    ({"features": "patches"}, "features", '"projected", "encoder" or "both"'),
    ({"method": "random", "seed": -1}, "seed", "an integer from 0"),
    ({"method": "random", "seed": 2**63}, "seed", "an integer from 0"),
    ({"sigma_d": 1.5}, "sigma_d", "1.5 given, but method resprune does not use sigma_d"),
    ({"correction": False}, "correction", "false given, but method resprune does not use correction"),
    ({"method": "cdpruner", "features": "both"}, "features", "method cdpruner does not use features"),
    ({"method": "uniform", "alpha": 0.5}, "alpha", "method uniform does not use alpha"),
    ({"method": "random", "text": {"query": "dog"}}, "text", "method random does not use text"),
    ({"method": "none", "budget": {"type": "ratio", "keep": 0.5}}, "budget", "method none does not use budget"),
    ({"method": "resprune", "budget": {"type": "ratio", "keep": 0.5}, "seed": 1}, "seed", "does not use seed"),
]


@pytest.mark.parametrize(("value", "path", "says"), WRONG, ids=[repr(w[:2])[:60] for w in WRONG])
def test_errors_name_field_value_and_what_is_accepted(value: object, path: str, says: str) -> None:
    with pytest.raises(PolicyError) as raised:
        PruningPolicy.parse(value, param="messages.0.content.1.pruning")
    error, message = raised.value, str(raised.value)
    assert isinstance(error, ValueError)
    assert error.param == "messages.0.content.1.pruning" + (f".{path}" if path else "")
    assert message.startswith(error.param + ": ")
    assert says in message
    assert error.accepted in message
    assert len(message) < 700
    assert "\n" not in message
    message.encode()
    for noise in ("pydantic", "Input should", "type=", "validation error"):
        assert noise not in message
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.param) == (message, error.param)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*DOCUMENTED, *EnergyBudget.model_fields, "keep", "scope", "query"])


@examples(300)
@given(
    value=st.dictionaries(FIELDS, JSON, max_size=3)
    | st.fixed_dictionaries({"budget": st.dictionaries(FIELDS, JSON, max_size=3)})
    | st.fixed_dictionaries({"text": st.dictionaries(FIELDS, JSON, max_size=3)})
    | JSON
)
def test_anything_is_a_policy_or_a_policy_error(value: object) -> None:
    try:
        result: PruningPolicy | PolicyError = PruningPolicy.parse(value)
    except PolicyError as error:
        result = error
    if isinstance(result, PruningPolicy):
        assert PruningPolicy.parse(result.dump()) == result
    else:
        assert result.param.startswith("pruning")
        assert len(str(result)) < 700


def test_explicit_defaults_of_other_methods_are_no_error() -> None:
    assert PruningPolicy.parse({"method": "uniform", "alpha": None, "sigma_d": None, "correction": True}).enabled


def test_frozen_and_hashable() -> None:
    policy = PruningPolicy.parse("fast")
    assert policy in {PruningPolicy.parse("fast")}
    with pytest.raises(ValueError, match="frozen"):
        policy.root = OFF.root
    with pytest.raises(ValueError, match="frozen"):
        policy.chosen.seed = 1


@pytest.mark.parametrize(
    ("fields", "conditions"),
    [
        ({}, True),
        ({"alpha": 0}, False),
        ({"alpha": 0, "seed_token": "relevance"}, True),
        ({"alpha": 0, "rank_by": "relevance"}, True),
        ({"method": "random"}, False),
        ({"method": "uniform"}, False),
        ({"method": "none"}, False),
        ({"method": "adaptprune"}, False),
        ({"method": "adaptprune", "importance": "relevance"}, True),
        ({"method": "avgpool", "importance": "relevance"}, True),
        ({"method": "cdpruner"}, True),
    ],
)
def test_conditions_on_text(fields: dict[str, object], conditions: bool) -> None:
    assert PruningPolicy.parse(fields).conditions_on_text is conditions


def test_resolve_fills_what_the_method_reads() -> None:
    def resolved(family: FamilyDefaults, *names: str, **fields: object) -> list[object]:
        dump = PruningPolicy.parse(fields).resolve(family).dump()
        return [dump[name] for name in names]

    assert resolved(LLAVA, "gate", "alpha", "seed_token") == ["minmax", ALPHA, "cls"]
    assert resolved(QWEN, "gate", "alpha", "seed_token") == ["minmax", ALPHA, "norm"]
    for family, alpha in ((LLAVA, 0.75), (QWEN, 0.3)):
        assert resolved(family, "alpha", gate="clip") == [alpha]
    assert resolved(LLAVA, "alpha", "seed_token", alpha=0.4, seed_token="mean") == [0.4, "mean"]
    assert OFF.resolve(LLAVA) is OFF
    cues = resolved(LLAVA, "importance", "sigma_d", "sigma_s", "radius", method="adaptprune", radius=3)
    assert cues == ["cls", 1.5, 0.05, 3]
    assert resolved(QWEN, "importance", method="adaptprune") == ["norm"]
    llava = PruningPolicy().resolve(LLAVA)
    uniform = PruningPolicy.parse({"method": "uniform"})
    assert uniform.resolve(LLAVA) == uniform
    assert PruningPolicy.parse(llava.dump()) == llava
    assert llava.resolve(LLAVA) == llava


def test_resolve_refuses_what_the_family_cannot_give() -> None:
    with pytest.raises(PolicyError, match=r'p.seed_token: "cls" needs cls_attention') as raised:
        PruningPolicy.parse({"seed_token": "cls"}).resolve(QWEN, param="p")
    assert (raised.value.param, raised.value.value) == ("p.seed_token", "cls")
    with pytest.raises(PolicyError, match='"center" needs grid'):
        PruningPolicy.parse({"seed_token": "center"}).resolve(FamilyDefaults(0.5, frozenset()))


@pytest.mark.parametrize("method", ["resprune", "divprune"])
@pytest.mark.parametrize("features", ["encoder", "both"])
def test_a_model_of_which_only_embeddings_are_known_is_compared_by_them_alone(method: str, features: str) -> None:
    policy = PruningPolicy.parse({"method": method, "features": features})
    policy.resolve(QWEN)
    with pytest.raises(PolicyError, match=f'"{features}" needs encoder, which this model') as raised:
        policy.resolve(Family(0.5, frozenset(), name="generic", connector=""), param="p")
    assert (raised.value.param, raised.value.accepted) == ("p.features", '"projected"')


def test_a_method_the_family_cannot_run_is_refused_with_those_it_can() -> None:
    with pytest.raises(PolicyError, match="method visionzip needs cls_attention, which this model") as raised:
        PruningPolicy.parse({"method": "visionzip"}).resolve(QWEN, param="p")
    assert (raised.value.param, raised.value.value) == ("p.method", "visionzip")
    accepted = raised.value.accepted.removeprefix("one of ").split(", ")
    assert {"none", "resprune", "adaptprune", "divprune", "uniform"} <= set(accepted)
    assert not {"visionzip", "scope", "tome", "hired"} & set(accepted)


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({}, {"text", "cls_attention", "grid"}),
        ({"alpha": 0, "seed_token": "norm"}, set()),
        ({"alpha": 0, "features": "encoder"}, {"encoder", "cls_attention", "grid"}),
        ({"features": "both"}, {"text", "encoder", "cls_attention", "grid"}),
        ({"method": "divprune"}, set()),
        ({"method": "divprune", "features": "encoder"}, {"encoder"}),
        ({"method": "scope"}, {"encoder", "cls_attention"}),
    ],
)
def test_what_a_policy_reads(fields: dict[str, object], inputs: set[str]) -> None:
    assert PruningPolicy.parse(fields).reads == inputs


def test_importance_by_relevance_also_reads_what_it_falls_back_to() -> None:
    policy = PruningPolicy.parse({"method": "adaptprune", "importance": "relevance"}).resolve(LLAVA)
    assert {"text", "cls_attention"} <= policy.reads


def digest(**fields: object) -> str:
    return PruningPolicy.parse(fields).resolve(LLAVA).selection_digest()


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        ({}, DOCUMENTED),
        ({}, {"alpha": ALPHA}),
        ({}, {"gate": "minmax"}),
        ({"gate": "clip"}, {"gate": "clip", "alpha": 0.75}),
        ({"alpha": 0}, {"alpha": 0, "gate": "clip"}),
        ({}, {"seed_token": "cls"}),
        ({}, {"features": "projected"}),
        ({}, {"text": {"query": "dog", "clean": False, "scope": "last_turn"}}),
        ({"budget": {"threshold": 1}}, {"budget": {"threshold": 1.0, "type": "energy"}}),
        ({"alpha": 0.0}, {"alpha": -0.0}),
        ({"alpha": 0}, {"alpha": 0.0, "relevance": "mean"}),
        ({"budget": {"solver": "exact"}}, {"budget": {"solver": "exact", "rank": 5, "power_iterations": 7}}),
        ({}, {"budget": {"rank": 5, "power_iterations": 7}}),
        ({"method": "none"}, {"method": "none", "alpha": None}),
        ({"method": "adaptprune"}, {"method": "adaptprune", "importance": "cls", "relevance": "mean", "sigma_d": 1.5}),
        ({"method": "adaptprune", "similarity": False}, {"method": "adaptprune", "similarity": False, "sigma_s": 1}),
    ],
)
def test_equal_selections_have_equal_digests(fields: dict[str, object], other: dict[str, object]) -> None:
    assert digest(**fields) == digest(**other)


def test_different_selections_have_different_digests() -> None:
    policies: list[dict[str, object]] = [
        {},
        {"alpha": 0.4},
        {"alpha": 0},
        {"gate": "clip"},
        {"gate": "clip", "alpha": ALPHA},
        {"relevance": "mean"},
        {"seed_token": "norm"},
        {"rank_by": "relevance"},
        {"features": "encoder"},
        {"features": "both"},
        {"alpha": 0, "features": "encoder"},
        {"method": "divprune"},
        {"method": "divprune", "features": "encoder"},
        {"method": "divprune", "features": "both"},
        {"budget": {"threshold": 0.98}},
        {"budget": {"min_tokens": 33}},
        {"budget": {"max_tokens": 100}},
        {"budget": {"solver": "exact"}},
        {"budget": {"solver": "rsvd"}},
        {"budget": {"solver": "rsvd", "rank": 100}},
        {"budget": {"solver": "rsvd", "power_iterations": 1}},
        {"budget": {"solver": "rsvd"}, "seed": 1},
        {"budget": {"type": "tokens", "keep": 1}},
        {"budget": {"type": "ratio", "keep": 1}},
        {"method": "adaptprune"},
        {"method": "adaptprune", "sigma_d": 2},
        {"method": "adaptprune", "distance": False},
        {"method": "adaptprune", "importance": "relevance"},
        {"method": "adaptprune", "importance": "relevance", "relevance": "mean"},
        {"method": "prumerge"},
        {"method": "prumerge", "budget": {"type": "method"}},
        {"method": "uniform"},
        {"method": "random"},
        {"method": "random", "seed": 1},
        {"method": "none"},
    ]
    assert len({digest(**fields) for fields in policies}) == len(policies)


def test_dump_is_what_a_client_would_write() -> None:
    fast = PruningPolicy.parse("fast").resolve(LLAVA)
    assert fast.dump() == {
        "method": "resprune",
        "budget": {"type": "ratio", "keep": 1 / 9},
        "text": DOCUMENTED["text"],
        "gate": "minmax",
        "alpha": ALPHA,
        "relevance": "max",
        "seed_token": "cls",
        "rank_by": "residual",
        "features": "projected",
    }
    assert OFF.dump() == {"method": "none"}
    uniform = PruningPolicy.parse({"method": "uniform", "budget": {"type": "tokens", "keep": 9}})
    assert uniform.dump() == {"method": "uniform", "budget": {"type": "tokens", "keep": 9}}


def test_an_object_may_name_a_preset() -> None:
    own = {"tiny": PruningPolicy.parse({"budget": {"type": "tokens", "keep": 5}})}
    assert PruningPolicy.parse({"preset": "fast"}) == PruningPolicy.parse("fast")
    assert PruningPolicy.parse({"preset": "tiny"}, presets=own) == own["tiny"]
    assert PruningPolicy.parse({"preset": None, "method": "uniform"}) == PruningPolicy.parse({"method": "uniform"})
    assert [preset_of(value) for value in ("fast", {"preset": "fast"}, {}, None, False)] == ["fast"] * 2 + [None] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"preset": "fst"}, 'pruning.preset: "fst" is not accepted (did you mean fast?); expected one of off, '),
        ({"preset": ["fast"]}, "pruning.preset: ['fast'] is not accepted; expected one of off, "),
        ({"preset": "fast", "seed": 1}, "pruning.seed: seed given beside a preset, which is a whole policy; expected "),
        ({"prest": "fast"}, "pruning.prest: unknown field (did you mean preset?); expected one of method, "),
    ],
)
def test_a_preset_in_an_object_that_cannot_be_used(value: object, message: str) -> None:
    with pytest.raises(PolicyError) as refused:
        PruningPolicy.parse(value)
    assert str(refused.value).startswith(message)
