"""The documentation's table of methods says what the methods say, and links each paper."""

import re
from pathlib import Path

import pytest

import vllm_vtprune
from vllm_vtprune.policy import LLAVA, PruningPolicy
from vllm_vtprune.selectors import METHODS, Method

ROOT = Path(vllm_vtprune.__file__).parents[1]
PAGE = (ROOT / "docs/methods.md").read_text()
INPUTS = {
    "cls_attention": "CLS attention",
    "keys": "encoder keys",
    "positions": "a grid or tiles",
    "dynamic_resolution": "dynamic resolution",
}


def row(name: str, method: type[Method]) -> list[str]:
    paper = method.paper
    if method.arxiv is not None:
        escaped = paper.replace("[", "\\[").replace("]", "\\]")
        paper = f"[{escaped}](https://arxiv.org/abs/{method.arxiv})"
    reads = "no"
    if "text" in method.needs | method.uses:
        reads = "yes" if PruningPolicy(method=name).conditions_on_text else "if asked to"
    needs = ", ".join(words for name, words in INPUTS.items() if name in method.needs)
    return [f"`{name}`", method.idea, paper, reads, needs, f"`{path(method)}`"]


def path(method: type[Method]) -> str:
    return method.__module__.replace(".", "/").removeprefix("vllm_vtprune/") + ".py"


def test_every_method_has_its_row_and_no_other() -> None:
    table = PAGE.split("| method | idea |")[1].split("\n\n")[0]
    written = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    assert written == [row(name, method) for name, method in METHODS.items()]


def test_the_page_says_which_methods_look_at_what_the_connector_reads() -> None:
    sentence = re.search(r"(.*) always compare tokens by\s+what the connector reads, (.*) by\s+what `features`", PAGE)
    always, if_asked = ({*re.findall(r"`(\w+)`", names)} for names in sentence.groups())
    assert always == {name for name, spec in METHODS.items() if "encoder" in spec.needs}
    assert if_asked == {name for name, spec in METHODS.items() if "encoder" in spec.uses}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_a_file_that_declares_what_the_rest_must_know(name: str) -> None:
    method = METHODS[name]
    assert len(method.idea.split()) <= 12
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv) if method.arxiv else method.paper == "baseline"
    assert [other for other in METHODS.values() if other.__module__ == method.__module__] == [method]
    assert method.preprocesses == (method.select is Method.select)
    assert method.capped == (method.max_keep.__func__ is not Method.max_keep.__func__)
    assert method.own_count == (method.count is not Method.count)
    assert ("text" in method.parameters()) == ("text" in method.needs | method.uses)
    assert set(INPUTS) >= method.needs - {"encoder"}
    assert set(method().defaults(LLAVA)) <= method.parameters()
    assert all(field.description for name, field in method.model_fields.items() if name != "method")
