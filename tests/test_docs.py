"""The documentation says what the code does: fields, presets, metrics, variables, options, models."""

import json
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from vllm_vtprune import envs, metrics
from vllm_vtprune.families import FAMILIES
from vllm_vtprune.plugin import version
from vllm_vtprune.policy import BUILTIN_PRESETS, EnergyBudget, PruningPolicy, TextOptions, TokensBudget
from vllm_vtprune.selectors import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of every row below this beginning of a table's head, in all such tables of a page."""
    lines = (DOCS / page).read_text().splitlines()
    cells = []
    for start, line in enumerate(lines):
        if line.startswith(head):
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                cells.append(re.split(r" *\| *", row[1:-1].strip()))
    assert cells, f"{page} has no table {head}"
    return cells


def names(page: str, head: str) -> set[str]:
    """What stands in backticks in the first column."""
    return {name for cells in rows(page, head) for name in re.findall(r"`([^`]+)`", cells[0])}


def test_every_field_of_a_policy_is_described_with_its_default() -> None:
    fields = {cells[0].strip("`"): json.loads(cells[1].strip("`")) for cells in rows("policy.md", "| field | default")}
    own = {name for method in METHODS.values() for name in method.model_fields}
    assert set(fields) == own | (EnergyBudget.model_fields.keys() - {"type"}) | TextOptions.model_fields.keys()
    for name, default in fields.items():
        if name in own:
            written = {name: default}
        else:
            written = {"budget" if name in EnergyBudget.model_fields else "text": {name: default}}
        assert PruningPolicy.parse(written) == PruningPolicy(), name

    table = rows("policy.md", "| field of `tokens`")
    shared = {cells[0].strip("`"): json.loads(cells[1].strip("`")) for cells in table}
    fields_of_tokens = TokensBudget.model_fields
    assert shared == {name: fields_of_tokens[name].default for name in fields_of_tokens if name not in ("type", "keep")}


def test_every_kind_of_budget_is_described() -> None:
    written = [json.loads(cells[0].strip("`")) for cells in rows("policy.md", "| budget | keeps")]
    kinds = {PruningPolicy.parse({"method": "trim", "budget": budget}).budget.type for budget in written}
    assert kinds == {"tokens", "ratio", "energy", "method"}


def test_presets_are_those_of_the_package() -> None:
    written = {cells[0].strip("`"): json.loads(cells[1].strip("`")) for cells in rows("policy.md", "| preset | policy")}
    assert written == BUILTIN_PRESETS


def test_every_metric_is_described_with_its_labels() -> None:
    written = {
        cells[0].strip("`"): (cells[1], set(re.findall(r"`(\w+)`", cells[2])))
        for cells in rows("metrics.md", "| metric |")
    }
    kinds = metrics.Counter | metrics.Gauge | metrics.Histogram
    collectors = [value for value in vars(metrics).values() if isinstance(value, kinds)]
    assert written == {
        collector._name + "_total" * (collector._type == "counter"): (
            collector._type,
            set(collector._labelnames) - {"model_name"},
        )
        for collector in collectors
    }


def test_every_variable_is_described_with_its_default() -> None:
    written = {cells[0].strip("`"): cells[1].strip("`") for cells in rows("server.md", "| variable |")}
    in_words = {"VTPRUNE_DOWNLOAD_DIR", "VTPRUNE_ENCODER_THREADS"}  # they depend on the machine
    assert set(written) == {variable.name for variable in envs.VARIABLES}
    for variable in envs.VARIABLES:
        if variable.name not in in_words:
            default = variable.default
            assert written[variable.name] == (default if isinstance(default, str) else f"{default:g}"), variable.name


def source_of(module: str) -> str:
    return Path(find_spec(module).origin).read_text()


@pytest.mark.parametrize(
    ("command", "page", "head"),
    [
        ("serve", "server.md", "| option | default | meaning"),
        ("inspect", "python.md", "| option | default | meaning"),
        ("eval", "evaluation.md", "| option | default | meaning"),
        ("calibrate", "evaluation.md", "| option | default | meaning"),
        ("bench", "bench.md", "| option | default | meaning"),
    ],
)
def test_every_option_of_a_command_is_described(command: str, page: str, head: str) -> None:
    source = source_of(entry_points(group="vtprune.commands")[command].module)
    shared = re.findall(r"^def (add_\w+)(.*?)(?=^def |\Z)", source_of("vllm_vtprune_evaluation.options"), re.M | re.S)
    source += "".join(body for name, body in shared if name in source)
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    written = {option for cell in names(page, head) for option in re.findall(r"--[a-z-]+", cell)}
    assert options
    assert options <= written
    if page != "evaluation.md":
        assert written == options


def test_every_architecture_is_listed() -> None:
    written = {
        cells[1].strip("`"): set(re.findall(r"`(\w+(?:Generation|Model))`", cells[2]))
        for cells in rows("models.md", "| model |")
        if cells[1]
    }
    assert written == {family: set(architectures) for family, architectures in FAMILIES.items()}


def test_every_tested_vllm_is_listed() -> None:
    assert tuple(cells[0] for cells in rows("install.md", "| vLLM | tested")) == version.TESTED


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Those of the site are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    inside = [link for link in links if "://" not in link]
    assert inside
    for link in inside:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else None
        return [str(entry)] if values is None else [page for value in values for page in pages(value)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(navigation)) == [page.name for page in PAGES]


@pytest.mark.parametrize(("page", "lines"), [("README.md", 150), ("docs/style.md", 40)])
def test_what_everybody_reads_is_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= lines
