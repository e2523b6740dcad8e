"""The documentation's table of methods says what the registry says, and links each paper."""

import re
from pathlib import Path

import pytest

import vllm_vtprune
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.selectors import METHODS, MethodSpec

ROOT = Path(vllm_vtprune.__file__).parents[1]
PAGE = (ROOT / "docs/methods.md").read_text()
LINK = re.compile(r"\[(.+)\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)")
INPUTS = {
    "cls_attention": "CLS attention",
    "keys": "encoder keys",
    "positions": "a grid or tiles",
    "dynamic_resolution": "dynamic resolution",
}


def row(spec: MethodSpec) -> list[str]:
    reads = "no"
    if spec.reads_text:
        reads = "yes" if PruningPolicy(method=spec.name).conditions_on_text else "if asked to"
    needs = ", ".join(words for name, words in INPUTS.items() if name in spec.needs)
    file = spec.module.replace(".", "/").removeprefix("vllm_vtprune/") + ".py"
    return [f"`{spec.name}`", spec.idea, spec.paper, reads, needs, f"`{file}`"]


def test_every_method_has_its_row_and_no_other() -> None:
    table = PAGE.split("| method | idea |")[1].split("\n\n")[0]
    written = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    for cells in written:
        link = LINK.fullmatch(cells[2])
        assert link or cells[2] == "baseline", f"{cells[0]}: the paper has no link"
        cells[2] = cells[2] if link is None else link[1].replace("\\", "")
    assert written == [row(spec) for spec in METHODS.values()]


def test_the_page_says_which_methods_look_at_what_the_connector_reads() -> None:
    sentence = re.search(r"(.*) always compare tokens by\s+what the connector reads, (.*) by\s+what `features`", PAGE)
    assert sentence is not None
    always, if_asked = ({*re.findall(r"`(\w+)`", names)} for names in sentence.groups())
    assert always == {name for name, spec in METHODS.items() if "encoder" in spec.needs}
    assert if_asked == {name for name, spec in METHODS.items() if "encoder" in spec.uses}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_a_file_that_names_its_paper(name: str) -> None:
    spec = METHODS[name]
    assert spec.name == name
    source = (ROOT / (spec.module.replace(".", "/") + ".py")).read_text()
    docstring = " ".join(source.split('"""')[1].split())
    if not spec.paper.startswith("baseline"):
        assert f'"{spec.paper}' in docstring
    module = __import__(spec.module, fromlist=["select"])
    assert spec.preprocesses != hasattr(module, "select")
    assert spec.own_count == hasattr(module, "own_count")
    assert spec.parameters <= set(PruningPolicy.model_fields)
    assert set(spec.defaults) <= spec.parameters
    assert ("text" in spec.parameters) == spec.reads_text
    assert set(INPUTS) >= spec.needs - {"encoder"}
