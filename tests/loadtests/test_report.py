"""The report says what was measured, and a dash where nothing was."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from loadtests.report import plots, table_rows, write_report
from tests.support.fake_chat import report
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import result


def record(start: float, ttft: float | None = 0.2, **fields: Any) -> Record:
    return Record("FreshImages", start, elapsed=1.0, **{"ttft": ttft, "itls": (0.1,), "e2e": 0.9, **fields})


RECORDS = {
    "stock": [record(10.0), record(11.0, 0.4), record(12.0, error="<i>cut</i>")],
    "ours & pruned": [record(20.0, 0.1, pruning=report(144)), record(21.0, None, itls=(), pruning=report(72))],
}
RESULTS = {run: result(records, model="m", label=run, users=1) for run, records in RECORDS.items()}


def test_a_row_has_the_value_of_every_run() -> None:
    rows = dict(table_rows(RESULTS))
    assert rows["requests that succeeded"] == ["2", "2"]
    assert rows["requests that failed"] == ["1", "0"]
    assert rows["TTFT median (ms)"] == ["300.0", "100.0"]
    assert rows["ITL p99 (ms)"] == ["100.0", "100.0"]


def test_what_was_not_measured_is_a_dash_and_no_row_where_no_run_has_it() -> None:
    rows = dict(table_rows({"nothing": result([], model="m", label="l", users=1), **RESULTS}))
    assert rows["TTFT p99 (ms)"][0] == "-"
    assert "TPOT p99 (ms)" not in rows, "no run counted output tokens"
    assert "good requests per second" not in rows


def test_the_file_shows_runs_kinds_and_failures(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", RESULTS, RECORDS, notes=["Measured <here>."])
    html = (tmp_path / "report.html").read_text()
    assert "Measured &lt;here&gt;." in html
    assert "&lt;i&gt;cut&lt;/i&gt;" in html
    assert "ours &amp; pruned" in html
    assert "0.188" in html, "the mean share kept"
    assert "<script" not in html


def test_plots_are_well_formed_and_name_the_runs() -> None:
    drawn = plots(RECORDS)
    assert len(drawn) == 5
    for svg in drawn:
        texts = "".join(ElementTree.fromstring(svg).itertext())
        assert "stock" in texts
    assert "TTFT by share of visual tokens kept" in drawn[-1]


def test_plots_of_nothing_say_so() -> None:
    for svg in plots({"failed": [record(1.0, None, itls=(), e2e=None, error="cut")]}):
        assert "nothing was measured" in "".join(ElementTree.fromstring(svg).itertext())
