"""The accuracies in the documentation are those of the committed results."""

import json
import re
from pathlib import Path

from PIL import Image

from evaluation.ablations import ABLATIONS, SOLVERS
from evaluation.report import plot_accuracy
from evaluation.results import Result
from vllm_vtprune.policy import BUILTIN_PRESETS

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "docs/benchmarks/eval-demo.json").read_text())
PAGE = (ROOT / "docs/evaluation.md").read_text()
README = (ROOT / "README.md").read_text()


def test_the_ranking_is_that_of_the_results() -> None:
    fixed = [r for r in PUBLISHED["ranked_results"] if r["keep"] and not (r["inside"] or r["adaptive"])]
    kept = sorted({result["keep"] for result in fixed}, reverse=True)
    assert f"| method | {' | '.join(f'{keep} tokens' for keep in kept)} |" in PAGE
    for method in {result["method"] for result in fixed}:
        cells = {
            r["keep"]: f"{r['accuracy']:.1%} ({100 * r['difference']:+.1f})" for r in fixed if r["method"] == method
        }
        row = " | ".join(cells.get(keep, "").replace("%", " %") for keep in kept)
        assert f"| `{method}` | {row} |" in PAGE


def test_the_plot_shows_the_results(tmp_path: Path) -> None:
    unpruned, *others = map(Result.from_json, PUBLISHED["ranked_results"])
    plot_accuracy(others, unpruned, tmp_path / "accuracy.png")
    with (
        Image.open(tmp_path / "accuracy.png") as drawn,
        Image.open(ROOT / "docs/benchmarks/eval-accuracy.png") as shown,
    ):
        assert shown.text["Description"] == drawn.text["Description"]
        assert shown.size == drawn.size


def test_the_readme_tells_the_same() -> None:
    at_64 = {r["method"]: r["accuracy"] for r in PUBLISHED["ranked_results"] if r["arm"] == f"{r['method']}@64"}
    section = README[README.index("## Accuracy") : README.index("## Speed")]
    told = re.findall(r"`(\w+)` ([\d.]+) %", section)
    assert len(told) >= 5
    assert [(method, f"{100 * at_64[method]:.1f}") for method, _ in told] == told
    whole = PUBLISHED["unpruned_2000_questions"]["accuracy"]
    assert f"{100 * whole:.1f} % of\n2,000 questions" in section
    assert f"**{100 * whole:.1f} %**" in PAGE


def test_the_presets_keep_what_the_readme_says() -> None:
    found = json.loads((ROOT / "docs/benchmarks/eval-presets.json").read_text())["results"]
    assert {result["arm"] for result in found} == {"unpruned", *BUILTIN_PRESETS} - {"off"}
    for result in found:
        name = {"unpruned": "off"}.get(result["arm"], result["arm"])
        accuracy, reading = (f"{100 * share:.1f} %" for share in (result["accuracy"], result["by_kind"]["reading"]))
        assert f"| `{name}` | {result['mean_tokens']:.1f} | {accuracy} | {reading} |" in README


def test_the_ablations_are_those_of_the_results() -> None:
    tables = json.loads((ROOT / "docs/benchmarks/eval-ablations.json").read_text())
    assert set(tables) == {*ABLATIONS, SOLVERS}
    for name, table in tables.items():
        assert f"`{name}`" in PAGE
        rows: dict[str, list[str]] = {}
        for result in table["ranked_results"]:
            if result["keep"]:
                tokens = f"{result['mean_tokens']:.1f} | " if result["adaptive"] else ""
                cell = f"{100 * result['accuracy']:.1f} % ({100 * result['difference']:+.1f})"
                rows.setdefault(result["method"], []).append(f"{tokens}{cell}")
        for row, cells in rows.items():
            assert f"| {row} | {' | '.join(cells)} |" in PAGE, name


def test_inside_the_language_model_it_is_as_the_page_says() -> None:
    found = json.loads((ROOT / "docs/benchmarks/eval-in-llm.json").read_text())["results"]
    assert {result["method"] for result in found} >= {"fastv", "pyramiddrop", "vtw"}
    for result in found:
        low, high = (f"{100 * end:.1f}" for end in result["ci95"])
        tokens, accuracy = f"{result['mean_tokens']:.1f}", f"{100 * result['accuracy']:.1f} %"
        assert f"| `{result['arm']}` | {tokens} | {accuracy} | {low} to {high} |" in PAGE
