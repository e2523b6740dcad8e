"""The accuracies in the documentation are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vllm_vtprune.policy import BUILTIN_PRESETS, PruningPolicy
from vllm_vtprune.selectors.registry import METHODS
from vllm_vtprune_evaluation import publish
from vllm_vtprune_evaluation.report import plot_accuracy
from vllm_vtprune_evaluation.results import Result

RESULTS = publish.ROOT / "docs/benchmarks"
PUBLISHED = json.loads((RESULTS / "eval-demo.json").read_text())
DEFAULT = PruningPolicy().method


@pytest.mark.parametrize("page", publish.PAGES)
def test_every_table_is_what_the_results_say(page: str) -> None:
    text = (publish.ROOT / page).read_text()
    assert publish.rendered(text, RESULTS) == text, "run python -m vllm_vtprune_evaluation.publish"


def test_every_table_is_published_once() -> None:
    pages = "".join((publish.ROOT / page).read_text() for page in publish.PAGES)
    names = [match["name"] for match in publish.TABLE.finditer(pages)]
    assert sorted(names) == sorted(publish.TABLES)


def test_a_stale_table_is_written_anew() -> None:
    page = "before\n<!-- table: presets -->\n\n| old |\n\n<!-- end -->\nafter\n"
    fresh = publish.rendered(page, RESULTS)
    assert "old" not in fresh
    assert fresh.startswith("before\n<!-- table: presets -->\n\n| preset |")
    assert fresh.endswith("<!-- end -->\nafter\n")
    assert publish.rendered(fresh, RESULTS) == fresh
    for name in BUILTIN_PRESETS:
        assert f"| `{name}` |" in fresh


def test_a_difference_is_that_of_the_shares_beside_it() -> None:
    tables = json.loads((RESULTS / "eval-merged.json").read_text())
    for kind in ("reading", "all"):
        first: dict[int, float] = {}
        [_, _, *lines] = publish.merged(tables, kind).splitlines()
        assert [line.split("|")[1].strip() for line in lines] == [
            f"`{method}`, {features}"
            for method in ("resprune", "divprune")
            for features in ("projected", "encoder", "both")
        ]
        for line in lines:
            for column, cell in enumerate(line.split("|")[2:-1]):
                share, *difference = (float(number) for number in re.findall(r"[-+]?\d+\.\d", cell))
                if "projected" in line:
                    first[column] = share
                    assert not difference
                else:
                    assert difference[0] == pytest.approx(share - first[column], abs=0.11)
                    assert difference[1] <= difference[0] <= difference[2]
                    assert ("**" in cell) == (difference[1] > 0 or difference[2] < 0)


@pytest.mark.parametrize(
    "page",
    [
        "<!-- table: presets -->\n| old |\n",
        "<!-- table: nope -->\n<!-- end -->\n",
        "<!-- table: presets --> <!-- end -->\n",
        "<!-- table: presets -->\n<!-- table: kinds -->\n<!-- end -->\n",
    ],
)
def test_a_marker_that_is_not_understood_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="were read; expected each to end"):
        publish.rendered(page, RESULTS)


def test_the_ranking_holds_every_method_of_this_model() -> None:
    table = publish.ranking(PUBLISHED)
    here = {name for name, spec in METHODS.items() if not spec.preprocesses}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == here
    assert PUBLISHED["results"][0]["questions"] == 2000


@pytest.mark.parametrize("keep", [128, 64, 32])
def test_no_method_is_more_than_a_point_ahead_of_the_default(keep: int) -> None:
    against = [pair for pair in PUBLISHED["paired"] if pair["keep"] == keep]
    assert len(against) > 15
    for pair in against:
        assert pair["arm"] == f"{DEFAULT}@{keep}"
        assert pair["difference"] > -0.01, f"{pair['less']} is better"


def test_the_default_is_ahead_of_every_other_method_somewhere() -> None:
    """Beyond the paired interval, at one budget at least: so there is no better default."""
    ahead = {pair["row"] for pair in PUBLISHED["paired"] if pair["ci95"][0] > 0}
    assert ahead == {pair["row"] for pair in PUBLISHED["paired"]}


def test_the_default_keeps_97_percent_of_the_right_answers_at_128_tokens() -> None:
    [default] = [result for result in PUBLISHED["ranked_results"] if result["arm"] == f"{DEFAULT}@128"]
    assert default["retained"] >= 0.97


def test_the_plot_shows_the_results(tmp_path: Path) -> None:
    unpruned, *others = (Result(**values) for values in PUBLISHED["ranked_results"])
    plot_accuracy(others, unpruned, tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as drawn, Image.open(RESULTS / "eval-accuracy.png") as shown:
        assert shown.text["Description"] == drawn.text["Description"]
        assert shown.size == drawn.size
