"""Resize: the image scaled down before encoding, for models with dynamic resolution.

Plain downsampling beats most methods in "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token
Compression Methods" (VTC-Bench, on Qwen2-VL), and saves encoder time, too. The image processor resizes; the engine gets
an ordinary image of that size.

The budget is an upper bound: the image keeps its aspect ratio and has as many tokens as its grid allows, at most k (121
of 128 for a square). It overrides both pixel limits of the processor, ``min_pixels`` too. The smallest grid is one
token, so every k can be met.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Literal

from vllm_vtprune.selectors.method import Method

MOST_PIXELS = 2**40
"""Larger than the area of any image within the largest budget."""


class Resize(Method):
    idea = "image scaled down before encoding"
    paper = "baseline (VTC-Bench)"
    arxiv = "2510.07143"
    cost = "nothing"
    needs = frozenset({"dynamic_resolution"})
    preprocesses = True

    method: Literal["resize"] = "resize"


def largest_area(tokens_at: Callable[[int], int], k: int) -> int:
    """The largest area, in pixels, at which an image has at most ``k`` tokens.

    Args:
        tokens_at: area in pixels -> tokens; non-decreasing, 1 at area 1.
        k: at least 1.
    """
    return bisect_right(range(1, MOST_PIXELS), k, key=tokens_at)
