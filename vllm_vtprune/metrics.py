"""Prometheus metrics of this process, under the prefix ``vtprune:``.

vLLM deletes collectors named ``vllm:*`` whenever it builds a logger, hence our own prefix. Counters and histograms are
summed over API processes; each gauge sets its ``multiprocess_mode``. Import this module only in processes that handle
requests: prometheus_client fixes its mode at import.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from prometheus_client import Counter, Gauge, Histogram

from vllm_vtprune.report import BypassReason, Placement

Outcome: TypeAlias = Literal["finished", "refused", "failed", "aborted"]
"""finished: answered; refused: 4xx; failed: 5xx; aborted: the client disconnected. Stream errors count by code."""
RefusalReason: TypeAlias = Literal["policy", "image"]

NO_PRESET, CUSTOM, MIXED, INVALID = "none", "custom", "mixed", "invalid"
"""Values of the label ``preset`` without a preset: no policy; an explicit one; several; one that was refused."""

REQUESTS = Counter(
    "vtprune:requests",
    "Requests that ended, by outcome and preset.",
    ["model_name", "outcome", "preset"],
)
REQUESTS_WAITING = Gauge(
    "vtprune:requests_waiting",
    "Requests whose images are being loaded, encoded or pruned, or wait for that.",
    ["model_name"],
    multiprocess_mode="livesum",
)
START_TIME = Gauge(
    "vtprune:start_time_seconds",
    "Unix time at which the server began to answer, in seconds.",
    ["model_name"],
    multiprocess_mode="livemax",
)
VISUAL_TOKENS = Counter(
    "vtprune:visual_tokens",
    "Visual tokens of finished requests before pruning.",
    ["model_name", "method", "preset"],
)
VISUAL_TOKENS_KEPT = Counter(
    "vtprune:visual_tokens_kept",
    "Visual tokens of finished requests that entered prefill.",
    ["model_name", "method", "preset"],
)
KEEP_RATIO = Histogram(
    "vtprune:keep_ratio",
    "Kept tokens / visual tokens, per image of finished requests.",
    ["model_name", "method"],
    buckets=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
IMAGES = Counter(
    "vtprune:images",
    "Images of finished requests whose tokens were selected, by where: in the API process or in the engine.",
    ["model_name", "placement"],
)
STAGE_SECONDS = Histogram(
    "vtprune:stage_seconds",
    "Seconds per request on one stage (text, encode, budget, select), over all its images.",
    ["model_name", "stage"],
    buckets=(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
TIME_TO_FIRST_TOKEN = Histogram(
    "vtprune:time_to_first_token_seconds",
    "Seconds from the arrival of a finished request with images to its first token, by share of visual tokens kept.",
    ["model_name", "method", "keep_ratio"],
    buckets=(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
ENCODE_BATCH_SIZE = Histogram(
    "vtprune:encode_batch_size",
    "Images per run of the vision encoder.",
    ["model_name"],
    buckets=(1, 2, 3, 4, 5, 6, 7, 8),
)
FEATURE_CACHE_HITS = Counter("vtprune:feature_cache_hits", "Images served from the feature cache.", ["model_name"])
FEATURE_CACHE_MISSES = Counter(
    "vtprune:feature_cache_misses", "Images that were not in the feature cache and were encoded.", ["model_name"]
)
FEATURE_CACHE_BYTES = Gauge(
    "vtprune:feature_cache_bytes",
    "Size of the feature cache, in bytes.",
    ["model_name"],
    multiprocess_mode="livesum",
)
ENCODER_RESTARTS = Counter(
    "vtprune:encoder_restarts",
    "Restarts of vision encoder processes, which servers with several API processes have, after they ended.",
    ["model_name"],
)
BYPASS = Counter(
    "vtprune:bypass",
    "Images of finished requests left unpruned although a policy applied, by reason.",
    ["model_name", "reason"],
)
ERRORS = Counter(
    "vtprune:errors", "Requests refused because of a policy or an image, by reason.", ["model_name", "reason"]
)
BUILD_INFO = Gauge(
    "vtprune:build_info",
    "Always 1; the labels name versions, placement, vision encoder and text pipeline.",
    [
        "model_name",
        "version",
        "vllm_version",
        "placement",
        "encoder_weights",
        "encoder_device",
        "encoder_dtype",
        "text_pipeline",
    ],
    multiprocess_mode="livemax",
)

KEEP_RATIO_BANDS = (0.125, 0.25, 0.5, 0.75)
"""Inclusive upper bounds of the bands of `keep_ratio_band`."""


def keep_ratio_band(kept: int, visual: int) -> str:
    """The label for a request's keep ratio: ``"unpruned"``, or a band such as ``"0.125-0.25"``."""
    if kept >= visual:
        return "unpruned"
    lower = 0.0
    for upper in KEEP_RATIO_BANDS:
        if kept <= upper * visual:
            return f"{lower:g}-{upper:g}"
        lower = upper
    return f"{lower:g}-1"


def start(model_name: str, presets: Iterable[str]) -> None:
    """Set the start time, and create the series of counters at 0.

    Otherwise Prometheus's ``rate`` would miss the first event of each series.

    Args:
        model_name: label of every metric.
        presets: names of all presets.
    """
    START_TIME.labels(model_name).set_to_current_time()
    REQUESTS_WAITING.labels(model_name)
    for counter in (ENCODER_RESTARTS, FEATURE_CACHE_HITS, FEATURE_CACHE_MISSES):
        counter.labels(model_name)
    for preset in (*presets, NO_PRESET, CUSTOM, MIXED, INVALID):
        for outcome in get_args(Outcome):
            REQUESTS.labels(model_name, outcome, preset)
    for placement in get_args(Placement):
        IMAGES.labels(model_name, placement)
    for reason in get_args(BypassReason):
        BYPASS.labels(model_name, reason)
    for reason in get_args(RefusalReason):
        ERRORS.labels(model_name, reason)
