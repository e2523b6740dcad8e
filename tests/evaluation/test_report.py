"""The plot of accuracies: what is drawn, that its labels can be read, and that it can be drawn anew from a file."""

import itertools
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vllm_vtprune_evaluation.report import (
    OKABE_ITO,
    accuracy_figure,
    main,
    plot_accuracy,
    plotted_lines,
    spread,
)
from vllm_vtprune_evaluation.results import Result
from vllm_vtprune_evaluation.tables import aligned, markdown

KINDS = {"colour": 0.9, "shape": 0.95}
OTHERS = ["scope", "cdpruner", "adaptprune", "prumerge", "tome", "dart", "last"]  # best first


def result(method: str, keep: int | None, accuracy: float, **changed: object) -> Result:
    whole = Result(
        arm=f"{method}@{keep}",
        method=method,
        budget=None,
        keep=keep,
        adaptive=False,
        inside=False,
        questions=50,
        mean_tokens=keep or 576,
        accuracy=accuracy,
        ci95=(accuracy - 0.05, accuracy + 0.04),
        difference=accuracy - 0.9,
        difference_ci95=(0.0, 0.0),
        retained=None,
        by_kind=KINDS,
        by_density={},
        tokens_by_density={},
    )
    return replace(whole, **changed)


UNPRUNED = result("unpruned", None, 0.9)
METHODS = [*OTHERS[:2], "resprune", *OTHERS[2:], "uniform", "random"]
RUN = [
    *(result(method, keep, 0.9 - 0.02 * place - 0.1 * (keep == 64)) for place, method in enumerate(METHODS)
      for keep in (64, 128, 192)),
    *(result(method, keep, 0.95, adaptive=True, mean_tokens=keep * 1.1) for method in METHODS for keep in (64, 128)),
    result("maxpool3x3", 64, 0.99),
    result("fastv", 64, 0.99, inside=True),
    result("trim (own count)", None, 0.99),
    result("fast", None, 0.99),
]  # fmt: skip


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_seven_lines_at_most_the_default_the_best_others_and_the_baselines() -> None:
    figure = accuracy_figure(RUN, UNPRUNED)
    drawn = [line.get_label() for line in figure.axes[0].lines[1:]]
    assert sorted(drawn) == sorted(["resprune", *OTHERS[:4], "uniform", "random"])
    assert labels(figure) == ["unpruned (576 tokens)", *drawn]
    assert figure.axes[0].get_legend() is None
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines[1:]}
    assert sorted(colours.values()) == sorted(OKABE_ITO), "each its own"
    assert len({line.get_marker() for line in figure.axes[0].lines[1:]}) == 7
    widths = {line.get_label(): line.get_linewidth() for line in figure.axes[0].lines[1:]}
    assert max(widths, key=widths.__getitem__) == "resprune"


def test_a_line_is_at_its_accuracies_in_percent_within_its_interval() -> None:
    axes = accuracy_figure(RUN, UNPRUNED).axes[0]
    place = [line.get_label() for line in axes.lines[1:]].index("uniform")
    x, y = axes.lines[1 + place].get_data()
    accuracy = [100 * (0.9 - 0.02 * METHODS.index("uniform") - drop) for drop in (0.1, 0.0, 0.0)]
    assert list(x) == [64, 128, 192]
    assert list(y) == pytest.approx(accuracy)
    band = axes.collections[place].get_datalim(axes.transData)
    assert (band.y0, band.y1) == pytest.approx((accuracy[0] - 5, accuracy[1] + 4))
    assert axes.lines[0].get_ydata()[0] == 90
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "128", "192"]
    assert axes.yaxis.get_major_formatter()(80) == "80 %"


def test_the_axis_tells_which_questions_count() -> None:
    ranked = accuracy_figure(RUN, UNPRUNED).axes[0].get_ylabel().replace("\n", " ")
    assert (
        ranked
        == "right answers to 50 questions of kinds that the unpruned model answers in 85 % or more: colour, shape"
    )
    every = accuracy_figure(RUN, replace(UNPRUNED, by_kind={**KINDS, "reading": 0.4})).axes[0].get_ylabel()
    assert every.replace("\n", " ") == "right answers to 50 questions of all kinds: colour, shape, reading"


def test_labels_do_not_overlap_and_nothing_is_cut_off() -> None:
    """Though all lines end at nearly one place."""
    close = [result(method, keep, 0.9 - 0.001 * place) for place, method in enumerate(METHODS) for keep in (64, 128)]
    figure = accuracy_figure(close, UNPRUNED)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the lines that lead to them
    assert len(boxes) == 8
    for label, other in itertools.combinations(boxes, 2):
        assert not label.overlaps(other)
    for box in [*boxes, figure.axes[0].yaxis.label.get_window_extent()]:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_without_the_default_and_the_baselines_the_seven_best_are_drawn() -> None:
    rows = [result(f"alpha {place}", keep, 0.9 - 0.01 * place) for place in range(9) for keep in (64, 128)]
    assert list(plotted_lines(rows)) == [f"alpha {place}" for place in range(7)]
    colours = [line.get_color() for line in accuracy_figure(rows, UNPRUNED).axes[0].lines[1:]]
    assert colours == list(OKABE_ITO)


def test_one_budget_or_none_at_all_can_be_drawn() -> None:
    single = accuracy_figure([result("scope", 58, 0.8), result("dart", 58, 0.7)], UNPRUNED)
    assert labels(single) == ["unpruned (576 tokens)", "scope", "dart"]
    assert labels(accuracy_figure([result("fast", None, 0.8)], UNPRUNED)) == ["unpruned (576 tokens)"]
    inside = [result("fastv", keep, 0.8, inside=True, mean_tokens=288 + keep / 2) for keep in (64, 128)]
    axes = accuracy_figure(inside, UNPRUNED).axes[0]
    assert list(axes.lines[1].get_xdata()) == [320, 352]
    assert axes.get_xscale() == "linear"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_labels_are_spread_no_further_than_needed(heights: list[float], gap: float) -> None:
    places = spread(heights, gap)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for low, high in itertools.pairwise(order):
        assert places[high] - places[low] >= gap - 1e-6
    assert sum(places) == pytest.approx(sum(heights)), "as far up as down"
    apart = [index * 2 * gap for index in range(len(heights))]
    assert spread(apart, gap) == pytest.approx(apart), "what is apart stays"


def test_two_labels_at_one_place_make_room_for_each_other() -> None:
    assert spread([50, 50, 90], 4) == [48, 52, 90]


def test_the_plot_is_drawn_anew_from_a_file_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot_accuracy(RUN, UNPRUNED, tmp_path / "first.png")
    ranked = [asdict(entry) for entry in (UNPRUNED, *RUN)]
    (tmp_path / "results.json").write_text(json.dumps({"results": [], "ranked_results": ranked}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "results.json"), "--out", str(tmp_path / "again.png")])
    main()
    with Image.open(tmp_path / "first.png") as first, Image.open(tmp_path / "again.png") as again:
        assert first.tobytes() == again.tobytes()
        assert first.width <= 1600
        description = again.text["Description"]
        assert description == first.text["Description"]
    assert description.startswith(
        "unpruned: 90.0 % of 50 questions; scope: 80.0 % at 64.0 tokens, 90.0 % at 128.0 tokens,"
    )

    (tmp_path / "results.json").write_text('{"results": []}')
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert re.search(r"results\.json given .*; expected the results\.json of", capsys.readouterr().err)


def test_a_table_on_a_terminal_is_aligned() -> None:
    table = markdown(["way", "mean tokens", "accuracy"], [["a long name", "64.0", ""], ["b", "128.0", "9.0 %"]])
    assert aligned(table).splitlines() == [
        "| way         | mean tokens | accuracy |",
        "| ----------- | ----------: | -------: |",
        "| a long name |        64.0 |          |",
        "| b           |       128.0 |    9.0 % |",
    ]
