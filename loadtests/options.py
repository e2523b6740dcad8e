"""Shared command line options and their parsers."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from vllm_vtprune_evaluation.load.results import METRICS

GOODPUT_METRICS = ("ttft", "tpot", "e2el")


def add_slo_arguments(parser: Any) -> None:
    """Add options for service level objectives; `p99_limits` reads the ``--slo-...`` ones."""
    for metric in METRICS:
        parser.add_argument(
            f"--slo-{metric}-p99-ms",
            type=positive,
            metavar="MS",
            help=f"exit with status 1 if the 99th percentile of {metric} is above this (milliseconds)",
        )
    parser.add_argument(
        "--goodput",
        type=goodput_limits,
        metavar="LIMITS",
        help=f"what a good request keeps to: {', '.join(GOODPUT_METRICS)} in milliseconds, such as 'ttft:500 tpot:50'",
    )


def p99_limits(options: argparse.Namespace) -> dict[str, float]:
    """The limits of the ``--slo-...`` options, in milliseconds, without unset ones."""
    limits = {metric: getattr(options, f"slo_{metric}_p99_ms") for metric in METRICS}
    return {metric: limit for metric, limit in limits.items() if limit is not None}


def goodput_limits(text: str) -> dict[str, float]:
    """Limits from the command line: ``METRIC:MS`` separated by spaces, as in ``vllm bench serve``."""
    limits = {}
    for part in text.split():
        metric, _, limit = part.partition(":")
        if metric not in GOODPUT_METRICS:
            raise argparse.ArgumentTypeError(f"{part!r}: expected METRIC:MS with one of {', '.join(GOODPUT_METRICS)}")
        limits[metric] = positive(limit)
    if not limits:
        raise argparse.ArgumentTypeError("no limit: expected METRIC:MS, such as ttft:500")
    return limits


def positive(text: str) -> float:
    """A number above 0 from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a number above 0")
    return value


def policy(text: str) -> object:
    """A policy from the command line: JSON, or the name of a preset."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
