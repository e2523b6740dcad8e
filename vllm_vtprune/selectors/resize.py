"""Resize: the picture scaled down before it is encoded, for models with dynamic resolution.

Plain downsampling comes out ahead of most methods in "Are We Using the Right Benchmark: An Evaluation Framework for
Visual Token Compression Methods" (VTC-Bench, on Qwen2-VL), and it saves the encoder's time too. The image processor
scales the picture; what enters the engine is an ordinary image of that size.

The budget is an upper bound: a picture that keeps its shape has at most k tokens, and as near to k as its grid allows
(121 of 128 for a square). The lower limit of the processor (``min_pixels``) gives way to it like the upper one, since a
budget is never exceeded under any other method either. The smallest grid is a single token, so every k can be met.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Literal

from vllm_vtprune.selectors.method import Method

MOST_PIXELS = 2**40
"""Beyond the area of any picture of as many tokens as a budget can name."""


class Resize(Method):
    idea = "image scaled down before encoding"
    paper = "baseline (VTC-Bench)"
    arxiv = "2510.07143"
    cost = "nothing"
    needs = frozenset({"dynamic_resolution"})
    preprocesses = True

    method: Literal["resize"] = "resize"


def largest_area(tokens_at: Callable[[int], int], k: int) -> int:
    """The largest area to which a picture may be scaled so that it has at most ``k`` tokens, in pixels.

    Args:
        tokens_at: tokens of the picture by the area to which it is scaled; never fewer for a larger area, and 1 for the
            smallest.
        k: at least 1.
    """
    return bisect_right(range(1, MOST_PIXELS), k, key=tokens_at)
