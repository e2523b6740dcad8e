"""Compute results from records: percentiles of raw samples, goodput, missed objectives.

Results have the keys of ``vllm bench serve``; our additional measurements are under ``vtprune``. Values that were not
measured are None.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from vllm_vtprune_evaluation.load.records import Record

Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = get_args(Metric)
PERCENTILES = (50, 90, 95, 99)
PUNCTUAL = 0.1  # seconds; a request sent within this lag is punctual

Limits = Mapping[str, float]  # milliseconds, by metric


def samples(records: Iterable[Record]) -> dict[Metric, list[float]]:
    """Milliseconds of every metric over successful requests; ``itl`` pools all gaps."""
    good = [record for record in records if record.error is None]
    seconds: dict[Metric, list[float | None]] = {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good],
        "itl": [gap for record in good for gap in record.itls],
        "e2el": [record.e2e for record in good],
    }
    return {metric: [1000 * value for value in values if value is not None] for metric, values in seconds.items()}


def percentile(milliseconds: Sequence[float], percent: float) -> float | None:
    """A percentile of raw samples with linear interpolation; None for an empty sample."""
    return float(np.percentile(milliseconds, percent)) if milliseconds else None


def is_good(record: Record, limits: Limits) -> bool:
    """Whether a request succeeded within every limit.

    As in ``vllm bench serve``, an answer of one token meets any limit on ``tpot``. Unmeasured values meet no limit.
    """
    if record.error is not None:
        return False
    seconds = {"ttft": record.ttft, "e2el": record.e2e, "tpot": 0.0 if record.output_tokens == 1 else record.tpot}
    return all((value := seconds[metric]) is not None and 1000 * value <= limit for metric, limit in limits.items())


def span(records: Sequence[Record]) -> float:
    """Seconds from the first start to the last end; 0 without requests."""
    if not records:
        return 0.0
    return max(record.started + record.elapsed for record in records) - min(record.started for record in records)


def result(
    records: Sequence[Record],
    *,
    model: str,
    label: str,
    users: int,
    rate: float | None = None,
    arrivals: str | None = None,
    goodput: Limits | None = None,
    duration: float | None = None,
) -> dict[str, Any]:
    """The applicable keys of ``vllm bench serve --save-result --save-detailed``, and ours under ``vtprune``.

    Args:
        records: all requests, including failed ones.
        model: served name of the model.
        label: label of the run.
        users: concurrent users; with a rate, the largest number of requests in flight.
        rate: scheduled requests per second; None: closed loop.
        arrivals: distribution of the scheduled times.
        goodput: limits of a good request, in milliseconds.
        duration: seconds of the run; None: the `span` of the records.
    """
    records = sorted(records, key=lambda record: record.started)
    done = [record for record in records if record.error is None]
    seconds = span(records) if duration is None else duration

    def per_second(amount: float) -> float:
        return amount / seconds if seconds else 0.0

    good = sum(is_good(record, goodput) for record in records) if goodput else None
    inputs = sum(record.input_tokens or 0 for record in done)
    outputs = sum(record.output_tokens or 0 for record in done)
    peak_tokens, peak_requests = peaks(done)
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": label,
        "model_id": model,
        "num_prompts": len(records),
        "request_rate": "inf" if rate is None else rate,
        "max_concurrency": users,
        "duration": seconds,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": per_second(len(done)),
        "request_goodput": None if good is None else per_second(good),
        "output_throughput": per_second(outputs),
        "total_token_throughput": per_second(inputs + outputs),
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        **summary(records),
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [list(record.itls) for record in records],
        "latencies": [record.e2e for record in records],
        "start_times": [record.started for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error or "" for record in records],
        "vtprune": {
            **pacing(records, rate, arrivals),
            "goodput_limits_ms": dict(goodput) if goodput else None,
            "without_content": sum(record.ttft is None for record in done),
            "without_usage": sum(record.output_tokens is None for record in done),
            "errors": dict(Counter(record.error for record in records if record.error is not None)),
            "keep_ratio": mean([ratio for record in done if (ratio := record.keep_ratio) is not None]),
            "kinds": kinds(done),
        },
    }


def pacing(records: Sequence[Record], rate: float | None, arrivals: str | None) -> dict[str, Any]:
    """How well the client kept its schedule; lags and stalls in milliseconds.

    At a constant rate: `achieved_rate`, requests sent per second between the first due time and the last sending;
    `punctual`, share of requests sent within `PUNCTUAL` seconds; `unsent`, requests never sent; lag, time from due to
    sending. Always: stall, the longest time that the client was blocked during a request.
    """
    sent = [] if rate is None else [(record.started, record.lag) for record in records if record.lag is not None]
    seconds = max(due + lag for due, lag in sent) - records[0].started if sent else 0.0
    lags = [1000 * lag for _, lag in sent]
    stalls = [1000 * record.stall for record in records]
    return {
        "offered_rate": rate,
        "arrivals": arrivals,
        "achieved_rate": (len(sent) - 1) / seconds if seconds else None,
        "punctual": sum(lag <= 1000 * PUNCTUAL for lag in lags) / len(records) if sent else None,
        "unsent": None if rate is None else len(records) - len(sent),
        "median_lag_ms": percentile(lags, 50),
        "p99_lag_ms": percentile(lags, 99),
        "max_lag_ms": percentile(lags, 100),
        "p99_stall_ms": percentile(stalls, 99),
        "max_stall_ms": percentile(stalls, 100),
    }


def summary(records: Iterable[Record]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles of every metric, in milliseconds."""
    values: dict[str, float | None] = {}
    for metric, sample in samples(records).items():
        values[f"mean_{metric}_ms"] = mean(sample)
        values[f"median_{metric}_ms"] = percentile(sample, 50)
        values[f"std_{metric}_ms"] = float(np.std(sample)) if sample else None
        values |= {f"p{percent}_{metric}_ms": percentile(sample, percent) for percent in PERCENTILES}
    return values


def mean(values: Sequence[float]) -> float | None:
    """The mean; None for an empty sample."""
    return float(np.mean(values)) if values else None


def kinds(records: Iterable[Record]) -> dict[str, dict[str, float | None]]:
    """For each kind of request: count, mean prompt tokens and keep ratio, median and p99 of TTFT (ms)."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    return {
        name: {
            "requests": len(group),
            "mean_input_tokens": mean([record.input_tokens for record in group if record.input_tokens is not None]),
            "median_ttft_ms": percentile(samples(group)["ttft"], 50),
            "p99_ttft_ms": percentile(samples(group)["ttft"], 99),
            "keep_ratio": mean([ratio for record in group if (ratio := record.keep_ratio) is not None]),
        }
        for name, group in sorted(by_name.items())
    }


def peaks(records: Sequence[Record]) -> tuple[float, int]:
    """The most chunks with content per second, and the most requests in flight."""
    first = min((record.started for record in records), default=0.0)
    chunks: Counter[int] = Counter()
    for record in records:
        if record.ttft is not None:
            moments = np.cumsum([record.started - first + record.ttft, *record.itls])
            chunks.update(int(moment) for moment in moments)
    ends = [(record.started + record.elapsed, -1) for record in records]
    changes = sorted([*ends, *((record.started, 1) for record in records)])
    in_flight = np.cumsum([change for _, change in changes])
    return float(max(chunks.values(), default=0)), int(max(in_flight, default=0))


def broken(records: Sequence[Record], p99_limits: Limits, pruning: object = None) -> list[str]:
    """Failed requests, missed p99 objectives and kinds of requests that pruned nothing, one sentence each.

    Args:
        records: the run's records.
        p99_limits: metric -> milliseconds.
        pruning: the policy that was sent; None, False and "off" ask for no pruning.
    """
    if not records:
        return ["no request was finished"]
    failed = Counter(record.error for record in records if record.error is not None)
    complaints = [f"{count} of {len(records)} requests failed: {error}" for error, count in failed.most_common(5)]
    if pruning not in (None, False, "off"):
        done = {record.name for record in records if record.error is None}
        pruned = {record.name for record in records if (record.keep_ratio or 1) < 1}
        complaints += [f"{kind}: nothing was pruned" for kind in sorted(done - pruned)]
    measured = samples(records)
    for metric in METRICS:
        limit = p99_limits.get(metric)
        if limit is None:
            continue
        p99 = percentile(measured[metric], 99)
        if p99 is None:
            complaints.append(f"{metric} p99 was to be {limit:g} ms at most, and was not measured")
        elif p99 > limit:
            complaints.append(f"{metric} p99 was to be {limit:g} ms at most, and is {p99:.1f} ms")
    return complaints
