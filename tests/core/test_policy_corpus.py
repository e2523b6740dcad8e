"""Bodies of the `pruning` field with the answers recorded before each method came to own its parameters.

Each line of the corpus is a body with what comes of it: the policy as it is dumped, the digest of its picks, what it
reads, and for each kind of family the parameters that are filled in with the digest then; or the error. A list of all
methods or of all fields stands in an error as ``{methods}``, ``{fields}`` and so on: it grows with them.
"""

import json
from pathlib import Path
from typing import Any

from tests.support.defaults import QWEN
from vllm_vtprune.policy import LLAVA, NONE, FamilyDefaults, PolicyError, PruningPolicy
from vllm_vtprune.selectors import METHODS

CORPUS = Path(__file__).parent / "data" / "policies.jsonl"
FAMILIES = {"llava": LLAVA, "qwen": QWEN, "bare": FamilyDefaults(0.5, frozenset())}
PARAM = "p"


def answer(body: object) -> dict[str, Any]:
    try:
        policy = PruningPolicy.parse(body, param=PARAM)
    except PolicyError as error:
        return {"error": template(error)}
    return {
        "dump": policy.dump(),
        "digest": policy.selection_digest(),
        "reads": sorted(policy.reads) if policy.enabled else None,
        "selects": policy.selects,
        "text": policy.conditions_on_text,
        "resolved": {name: resolved(policy, family) for name, family in FAMILIES.items()},
    }


def resolved(policy: PruningPolicy, family: FamilyDefaults) -> dict[str, Any]:
    try:
        filled = policy.resolve(family, param=PARAM)
    except PolicyError as error:
        return {"error": template(error, family)}
    before = policy.dump()
    changes = {name: value for name, value in filled.dump().items() if value != before[name]}
    return {"digest": filled.selection_digest(), "filled": changes}


def template(error: PolicyError, family: FamilyDefaults | None = None) -> str:
    lists = {"methods": ", ".join([NONE, *METHODS]), "own": ", ".join(n for n, m in METHODS.items() if m.own_count)}
    if family is not None:
        lists["supported"] = ", ".join([NONE, *(name for name, method in METHODS.items() if family.supports(method))])
    if "unknown field" in str(error) and error.accepted.startswith("one of method, budget"):
        lists["fields"] = error.accepted
    message = str(error)
    assert message.startswith(f"{error.param}: ")
    assert error.accepted in message
    for name, listed in sorted(lists.items(), key=lambda item: -len(item[1])):  # one may be a part of another
        message = message.replace(listed, f"{{{name}}}")
    return message


def test_answers_are_those_recorded() -> None:
    recorded = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    assert len(recorded) > 500
    valid = [line["dump"]["method"] for line in recorded if "dump" in line]
    assert min(valid.count(method) for method in (NONE, "resprune", "resize", "last")) >= 5
    for line in recorded:
        assert json.loads(json.dumps(answer(line["body"]))) == {k: v for k, v in line.items() if k != "body"}, line[
            "body"
        ]


if __name__ == "__main__":  # record anew, for a change that is meant
    bodies = [json.loads(line)["body"] for line in CORPUS.read_text().splitlines()]
    lines = [json.dumps({"body": body, **answer(body)}, separators=(",", ":")) for body in bodies]
    CORPUS.write_text("\n".join(lines) + "\n")
