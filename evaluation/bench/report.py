"""The tables, sentences and plots of a benchmark, for the terminal and as one file of HTML."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from markupsafe import Markup
from PIL import Image

from vllm_vtprune_evaluation.bench.rounds import OFF, STOCK, Level, Measured
from vllm_vtprune_evaluation.bench.subjects import Subject
from vllm_vtprune_evaluation.bench.summary import Quality, Speed
from vllm_vtprune_evaluation.load.page import Section, distribution, empty, svg, write_page
from vllm_vtprune_evaluation.load.ratios import PairedRatio
from vllm_vtprune_evaluation.load.results import samples
from vllm_vtprune_evaluation.messages import data_url
from vllm_vtprune_evaluation.tables import table, written

SPEED_HEAD = ("clients", "arm", "p50 ms", "p99 ms", "to off", "req/s", "to off", "tok/s")
QUALITY_HEAD = (
    "arm",
    "tokens",
    "kept",
    "share",
    "same answers",
    "first word",
    "similar",
    "right",
    "selected by",
    "plan",
)
SHOWN = 12  # questions in the HTML file
THUMBNAIL = (144, 112)  # pixels
WIDTH = 100  # columns of a terminal

SPEED_NOTE = (
    "Time to first token (p50, p99), requests and output tokens per second. To off: ratio to the arm off in the same "
    "round, geometric mean over rounds with a 95 % interval (Student's t of the logarithms). Repeated: pictures that "
    "the server has in its caches; all others are new to it. Answers have a fixed length here. Stock vLLM has a server "
    "of its own, in turns with ours: what changes on the machine between two turns is in its ratios."
)
QUALITY_NOTE = (
    "Visual tokens of an image and how many were kept, on average. Greedy answers beside the unpruned ones: the same "
    "(95 % interval), the same first word, similarity of the words (1: equal). The row off is the unpruned model "
    "asked a second time: what it says is what the others could reach. Selected by: the API process or the engine. "
    "Plan: share of the server's time to first token spent on reading the text, the budget and the selection; a dash "
    "where the engine selects."
)


def speed_rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """The table under `SPEED_HEAD`."""
    return [
        [
            f"{speed.clients}{'' if speed.new else ' repeated'}",
            speed.arm,
            written(speed.ttft_p50, ".0f"),
            written(speed.ttft_p99, ".0f"),
            _ratio(speed.ttft_ratio),
            f"{speed.requests_per_second:.2f}",
            _ratio(speed.throughput_ratio),
            f"{speed.tokens_per_second:.1f}",
        ]
        for speed in speeds
    ]


def _ratio(ratio: PairedRatio | None) -> str:
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def quality_rows(qualities: Sequence[Quality]) -> list[list[str]]:
    """The table under `QUALITY_HEAD`."""
    return [
        [
            quality.arm,
            written(quality.visual_tokens, ".1f"),
            written(quality.kept_tokens, ".1f"),
            written(quality.share, ".1%"),
            f"{quality.same:.0%} [{quality.same_ci95[0]:.0%}, {quality.same_ci95[1]:.0%}]",
            f"{quality.first_word:.0%}",
            f"{quality.similarity:.2f}",
            written(quality.right, ".0%"),
            quality.placement or "-",
            written(quality.plan_share, ".1%"),
        ]
        for quality in qualities
    ]


def sentences(speeds: Sequence[Speed], qualities: Sequence[Quality]) -> list[str]:
    """What pruning did, one sentence for each arm that prunes."""
    out = []
    for quality in qualities:
        if quality.arm in (OFF, STOCK) or quality.share is None:
            continue
        new = [speed for speed in speeds if speed.arm == quality.arm and speed.new]
        parts = [f"{quality.arm} keeps {quality.share:.0%} of the visual tokens"]
        if new and (ttft := new[0].ttft_ratio):
            template = "the first token takes {} times as long"
            parts.append(_compared(ttft, template, "the time to the first token", Level(new[0].clients)))
        if new and (rate := new[-1].throughput_ratio):
            template = "{} times as many requests per second"
            parts.append(_compared(rate, template, "requests per second", Level(new[-1].clients)))
        parts.append(f"{quality.same:.0%} of {quality.questions} answers are the same")
        out.append(", ".join(parts) + ".")
    return out


def _compared(ratio: PairedRatio, template: str, quantity: str, level: Level) -> str:
    """What a ratio to `OFF` says; where its interval holds 1, that it shows no difference."""
    if ratio.low <= 1 <= ratio.high:
        return f"no difference in {quantity} shown with {level} ({_ratio(ratio)})"
    return f"{template.format(_ratio(ratio))} with {level}"


def text(speeds: Sequence[Speed], qualities: Sequence[Quality]) -> str:
    """The result for a terminal."""
    return "\n\n".join(
        [
            table(SPEED_HEAD, speed_rows(speeds), texts=2),
            table(QUALITY_HEAD, quality_rows(qualities)),
            "\n".join(fill(sentence, WIDTH) for sentence in sentences(speeds, qualities)),
        ]
    )


def write_html(
    path: Path,
    title: str,
    speeds: Sequence[Speed],
    qualities: Sequence[Quality],
    measured: Measured,
    subjects: Sequence[Subject],
    about: Mapping[str, str],
    alerts: Sequence[str],
) -> None:
    """Write the report; ``alerts`` come before everything else, ``about`` says how it was measured."""
    write_page(
        path,
        title,
        [
            Section(before=sentences(speeds, qualities)),
            Section("Speed", head=SPEED_HEAD, rows=speed_rows(speeds), texts=2, grouped=True, after=[SPEED_NOTE]),
            Section("Tokens and answers", head=QUALITY_HEAD, rows=quality_rows(qualities), after=[QUALITY_NOTE]),
            Section("Plots", plots=plots(speeds, measured)),
            Section(
                "Answers",
                head=("picture", "question", *measured.answers),
                rows=list(_answers(measured, subjects)),
                texts=2 + len(measured.answers),
                before=[f"The first {min(SHOWN, len(subjects))} of {len(subjects)} questions."],
            ),
            Section("How this was measured", head=("", ""), rows=list(about.items()), texts=2),
        ],
        alerts,
    )


def _answers(measured: Measured, subjects: Sequence[Subject]) -> list[list[str]]:
    rows = []
    for index, subject in enumerate(subjects[:SHOWN]):
        with Image.open(io.BytesIO(subject.data)) as image:
            image.thumbnail(THUMBNAIL)
            source = data_url(image.convert("RGB"), "JPEG", quality=80)
        picture = Markup('<img alt="{}" src="{}">').format(subject.label, source)
        right = f" (right: {subject.answer})" if subject.answer else ""
        rows.append(
            [picture, subject.question + right, *(records[index].text for records in measured.answers.values())]
        )
    return rows


def plots(speeds: Sequence[Speed], measured: Measured) -> list[Markup]:
    """TTFT and throughput by clients, the distribution of TTFT at each level, tokens kept of each picture."""
    drawn = [
        _by_clients("Time to first token, p50 (ms)", speeds, "ttft_p50", "%.0f"),
        _by_clients("Requests per second", speeds, "requests_per_second", "%.2f"),
    ]
    for level, by_arm in measured.rounds.items():
        ttft = {arm: samples(record for block in blocks for record in block)["ttft"] for arm, blocks in by_arm.items()}
        drawn.append(distribution(f"TTFT: share of requests within, {level}", ttft))
    return [*drawn, _kept(measured)]


def _by_clients(title: str, speeds: Sequence[Speed], value: str, style: str) -> Markup:
    """A group of bars for each number of clients, a bar for each arm."""
    figure, axes = empty(title)
    new = [speed for speed in speeds if speed.new]
    clients = sorted({speed.clients for speed in new})
    arms = list(dict.fromkeys(speed.arm for speed in new))
    width = 0.8 / max(1, len(arms))
    for position, arm in enumerate(arms):
        points = [(clients.index(speed.clients), getattr(speed, value)) for speed in new if speed.arm == arm]
        places = [place + (position - (len(arms) - 1) / 2) * width for place, _ in points]
        bars = axes.bar(places, [height or 0.0 for _, height in points], width, label=arm)
        axes.bar_label(bars, fmt=style, fontsize=7)
    axes.set_xticks(range(len(clients)), [str(Level(number)) for number in clients])
    axes.grid(visible=False, axis="x")
    return svg(figure, axes)


def _kept(measured: Measured) -> Markup:
    """Tokens kept of each picture, one line for each arm."""
    figure, axes = empty("Visual tokens kept of each picture")
    for arm, records in measured.answers.items():
        kept = [sum(image["kept_tokens"] for image in record.pruning["images"]) for record in records if record.pruning]
        if kept:
            axes.plot(range(1, len(kept) + 1), kept, ".-", label=arm)
    axes.set_xlabel("picture")
    axes.set_ylim(bottom=0)
    return svg(figure, axes)
