"""From records to results: percentiles of raw samples, goodput, and promises that were not held.

The results have the keys of ``vllm bench serve``. What only this project measures stands under the key
``vtprune``. Numbers that were not measured are None.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from loadtests.pace import Arrivals
from loadtests.records import Record

Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: tuple[Metric, ...] = get_args(Metric)
PERCENTILES = (50, 90, 95, 99)
PUNCTUAL = 0.1  # seconds after it was due, in which a request is sent in time

Limits = Mapping[str, float]  # milliseconds, by metric


def samples(records: Iterable[Record]) -> dict[Metric, list[float]]:
    """Milliseconds of every metric over the requests that succeeded; of ``itl``, all gaps together."""
    good = [record for record in records if record.error is None]
    seconds: dict[Metric, list[float | None]] = {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good],
        "itl": [gap for record in good for gap in record.itls],
        "e2el": [record.e2e for record in good],
    }
    return {metric: [1000 * value for value in values if value is not None] for metric, values in seconds.items()}


def percentile(milliseconds: Sequence[float], percent: float) -> float | None:
    """A percentile of raw samples, between the two nearest where it falls between; None of nothing."""
    return float(np.percentile(milliseconds, percent)) if milliseconds else None


def is_good(record: Record, limits: Limits) -> bool:
    """Whether a request succeeded within every limit.

    As in ``vllm bench serve``, an answer of one token meets any limit on ``tpot``. What was not measured meets none.
    """
    if record.error is not None:
        return False
    seconds = {"ttft": record.ttft, "e2el": record.e2e, "tpot": 0.0 if record.output_tokens == 1 else record.tpot}
    return all((value := seconds[metric]) is not None and 1000 * value <= limit for metric, limit in limits.items())


def span(records: Sequence[Record]) -> float:
    """Seconds from the first request's start to the last one's end; 0 of nothing."""
    if not records:
        return 0.0
    return max(one.started + one.elapsed for one in records) - min(one.started for one in records)


def result(
    records: Sequence[Record],
    *,
    model: str,
    label: str,
    users: int,
    rate: float | None = None,
    arrivals: Arrivals | None = None,
    goodput: Limits | None = None,
    duration: float | None = None,
) -> dict[str, Any]:
    """What ``vllm bench serve --save-result --save-detailed`` would write, where it means something here, and ours.

    Args:
        records: all requests, failed ones included.
        model: its name, as served.
        label: of this run.
        users: that asked at the same time; with a rate, the most that could.
        rate: requests per second that were to be sent; None where users ask again as soon as they are answered.
        arrivals: how those were spread.
        goodput: limits of a good request, in milliseconds.
        duration: seconds in which the requests were sent and answered; None: the `span` of the records.
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


def pacing(records: Sequence[Record], rate: float | None, arrivals: Arrivals | None) -> dict[str, Any]:
    """How the client did what it should; lags and stalls are in milliseconds.

    At a constant rate: `achieved_rate`, requests sent per second from when the first was due to when the last was sent;
    `punctual`, the share of all that were sent within `PUNCTUAL` seconds after they were due; `unsent`, how many never
    were; and the lag, from when a request was due to when it was sent. In any case the stall: the longest that the
    client was busy otherwise during a request.
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
    for metric, found in samples(records).items():
        values[f"mean_{metric}_ms"] = mean(found)
        values[f"median_{metric}_ms"] = percentile(found, 50)
        values[f"std_{metric}_ms"] = float(np.std(found)) if found else None
        values |= {f"p{percent}_{metric}_ms": percentile(found, percent) for percent in PERCENTILES}
    return values


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return float(np.mean(values)) if values else None


def kinds(records: Iterable[Record]) -> dict[str, dict[str, float | None]]:
    """How many requests of each kind, their mean prompt tokens and keep ratio, median and p99 of TTFT (ms)."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    return {
        name: {
            "requests": len(found),
            "mean_input_tokens": mean([one.input_tokens for one in found if one.input_tokens is not None]),
            "median_ttft_ms": percentile(samples(found)["ttft"], 50),
            "p99_ttft_ms": percentile(samples(found)["ttft"], 99),
            "keep_ratio": mean([ratio for one in found if (ratio := one.keep_ratio) is not None]),
        }
        for name, found in sorted(by_name.items())
    }


def peaks(records: Sequence[Record]) -> tuple[float, int]:
    """The most chunks with content in one second, and the most requests in flight at one time."""
    first = min((record.started for record in records), default=0.0)
    chunks: Counter[int] = Counter()
    for record in records:
        if record.ttft is not None:
            moments = np.cumsum([record.started - first + record.ttft, *record.itls])
            chunks.update(int(moment) for moment in moments)
    ends = [(record.started + record.elapsed, -1) for record in records]
    changes = sorted([*ends, *((record.started, 1) for record in records)])
    flying = np.cumsum([change for _, change in changes])
    return float(max(chunks.values(), default=0)), int(max(flying, default=0))


def broken(records: Sequence[Record], p99_limits: Limits, pruning: object = None) -> list[str]:
    """What was promised and not held, a sentence each.

    No request may fail, p99 may not exceed the limits, and every kind of request that asks for pruning gets some.

    Args:
        records: of the run.
        p99_limits: milliseconds, by metric.
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
