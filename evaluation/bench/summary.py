"""What follows from the requests of a benchmark: speed with ratios to ``off``, tokens, agreement, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean, median
from typing import Any

from scipy.stats import binomtest

from vllm_vtprune_evaluation.bench.rounds import OFF, Arm, Measured, throughput
from vllm_vtprune_evaluation.bench.subjects import Subject
from vllm_vtprune_evaluation.load.ratios import PairedRatio, paired_ratio
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import broken, percentile, samples, span
from vllm_vtprune_evaluation.questions import plain

PLAN = ("text", "budget", "select")  # stages of `timings_ms` that pruning adds


@dataclass(frozen=True)
class Speed:
    """An arm at a level. Times in milliseconds; None where nothing was measured.

    Attributes:
        arm: its name.
        clients: concurrent clients.
        new: whether all pictures were new to the server.
        requests: requests that succeeded.
        ttft_p50, ttft_p99: time to first token.
        requests_per_second, tokens_per_second: successful requests, and their output tokens.
        ttft_ratio, throughput_ratio: median TTFT and requests per second, by those of `OFF` in the same round.
    """

    arm: str
    clients: int
    new: bool
    requests: int
    ttft_p50: float | None
    ttft_p99: float | None
    requests_per_second: float
    tokens_per_second: float
    ttft_ratio: PairedRatio | None
    throughput_ratio: PairedRatio | None


@dataclass(frozen=True)
class Quality:
    """What an arm keeps, and its greedy answers beside the unpruned ones.

    Attributes:
        arm: its name.
        visual_tokens, kept_tokens: of an image, on average; None without a report.
        share: kept by visual tokens.
        questions: answers compared.
        same: share of answers equal to the unpruned ones, but for case, spaces at the ends and a full stop.
        same_ci95: its 95 % interval (Wilson).
        first_word: share with the same first word.
        similarity: mean similarity of the words, from 0 to 1 (difflib).
        right: share of right answers; None if they are not known.
        placement: the process that selected tokens; None if nobody did.
        plan_share: share of the server's time to first token spent on the plan, median over new pictures at the fewest
            clients; None if the server did not measure it, as it does not where the engine selects.
    """

    arm: str
    visual_tokens: float | None
    kept_tokens: float | None
    share: float | None
    questions: int
    same: float
    same_ci95: tuple[float, float]
    first_word: float
    similarity: float
    right: float | None
    placement: str | None
    plan_share: float | None


def speeds(measured: Measured) -> list[Speed]:
    """Every arm at every level."""
    out = []
    for level, by_arm in measured.rounds.items():
        for arm, blocks in by_arm.items():
            done = [record for block in blocks for record in block if record.error is None]
            seconds = sum(span(block) for block in blocks)
            ttft = samples(done)["ttft"]
            ratios: tuple[PairedRatio | None, PairedRatio | None] = (None, None)
            if arm != OFF and OFF in by_arm:
                ratios = _ratio(blocks, by_arm[OFF], _median_ttft), _ratio(blocks, by_arm[OFF], throughput)
            out.append(
                Speed(
                    arm,
                    level.clients,
                    level.new,
                    len(done),
                    percentile(ttft, 50),
                    percentile(ttft, 99),
                    len(done) / seconds if seconds else 0.0,
                    sum(record.output_tokens or 0 for record in done) / seconds if seconds else 0.0,
                    *ratios,
                )
            )
    return out


def _median_ttft(block: Sequence[Record]) -> float:
    return percentile(samples(block)["ttft"], 50) or 0.0


def _ratio(blocks: Sequence[Sequence[Record]], others: Sequence[Sequence[Record]], value: Any) -> PairedRatio | None:
    """A ratio over the rounds in which both were measured."""
    pairs = [(value(block), value(other)) for block, other in zip(blocks, others, strict=False)]
    whole = [pair for pair in pairs if min(pair) > 0]
    return paired_ratio(*zip(*whole, strict=True)) if whole else None


def qualities(measured: Measured, subjects: Sequence[Subject]) -> list[Quality]:
    """Every arm; `OFF` is compared with itself, asked a second time."""
    unpruned = [record.text for record in measured.answers[OFF]]
    fewest = min((level for level in measured.rounds if level.new), key=lambda level: level.clients, default=None)
    out = []
    for arm, records in measured.answers.items():
        compared = measured.again if arm == OFF else records
        timed = measured.rounds[fewest].get(arm, []) if fewest else []
        images = [image for record in records for image in (record.pruning or {}).get("images", ())]
        visual, kept = (
            [image[key] for image in images if image[key] is not None] for key in ("visual_tokens", "kept_tokens")
        )
        pairs = [(mine.text, text) for mine, text in zip(compared, unpruned, strict=False) if mine.error is None]
        same = sum(plain(mine) == plain(text) for mine, text in pairs)
        interval = binomtest(same, len(pairs)).proportion_ci(method="wilson") if pairs else (0.0, 1.0)
        placed = Counter(placement for image in images if (placement := image.get("placement")))
        known = [subject.answer for subject in subjects if subject.answer]
        right = [plain(r.text) == plain(s.answer) for r, s in zip(records, subjects, strict=False) if s.answer]
        shares = [share for block in timed for record in block if (share := plan_share(record)) is not None]
        out.append(
            Quality(
                arm,
                fmean(visual) if visual else None,
                fmean(kept) if kept else None,
                sum(kept) / sum(visual) if visual else None,
                len(pairs),
                same / max(1, len(pairs)),
                (float(interval[0]), float(interval[1])),
                fmean(_first(mine) == _first(text) for mine, text in pairs) if pairs else 0.0,
                fmean(similarity(mine, text) for mine, text in pairs) if pairs else 0.0,
                fmean(right) if known else None,
                placed.most_common(1)[0][0] if placed else None,
                median(shares) if shares else None,
            )
        )
    return out


def similarity(text: str, other: str) -> float:
    """Similarity of two answers' words, from 0 (none in common) to 1 (the same, in the same order)."""
    return SequenceMatcher(None, plain(text).split(), plain(other).split(), autojunk=False).ratio()


def _first(text: str) -> str:
    return (plain(text).split() or [""])[0]


def plan_share(record: Record) -> float | None:
    """The share of the server's time to first token that the plan took; None if it was not measured."""
    timings: Mapping[str, float | None] = (record.pruning or {}).get("timings_ms") or {}
    stages = [timings.get(stage) for stage in PLAN]
    ttft = timings.get("ttft")
    if not ttft or timings.get("select") is None:
        return None
    return sum(stage or 0.0 for stage in stages) / ttft


def refusals(arms: Sequence[Arm], answers: Mapping[str, Sequence[Record]]) -> list[str]:
    """Why the answers are no ground for a measurement, one sentence each; empty if they are.

    Args:
        arms: the arms.
        answers: by arm.
    """
    out = []
    for arm in arms:
        records = answers[arm.name]
        failed = [f"{arm.name}: {complaint}" for complaint in broken(records, {})]
        if failed:
            out += failed
        elif arm.pruning is not None and not all(record.pruning for record in records):
            out.append(f"{arm.name}: the answers hold no pruning report; expected a server started by `vtprune serve`")
        elif arm.prunes and not any((record.keep_ratio or 1) < 1 for record in records):
            images = [image for record in records for image in (record.pruning or {})["images"]]
            reasons = Counter(str(image.get("bypass_reason")) for image in images if image.get("bypass_reason"))
            why = f" ({', '.join(reasons)})" if reasons else ""
            out.append(
                f"{arm.name}: nothing was pruned{why}; expected a policy that keeps fewer tokens than the pictures have"
            )
    return out


def complaints(arms: Sequence[Arm], measured: Measured) -> list[str]:
    """Failed requests, and arms that pruned nothing at a level, one sentence each."""
    out = []
    for level, by_arm in measured.rounds.items():
        for arm in arms:
            records = [record for block in by_arm.get(arm.name, []) for record in block]
            out += [f"{arm.name}, {level}: {complaint}" for complaint in broken(records, {})]
            if arm.prunes and not any((record.keep_ratio or 1) < 1 for record in records):
                out.append(f"{arm.name}, {level}: nothing was pruned")
    return out
