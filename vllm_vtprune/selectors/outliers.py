"""How many scores stand out: the count of methods that find their own."""

import torch
from torch import Tensor


def upper_outliers(scores: Tensor) -> int:
    """How many of ``scores (N,)`` lie more than 1.5 interquartile ranges above the third quartile."""
    first, third = torch.quantile(scores.double(), torch.tensor([0.25, 0.75], dtype=torch.float64).to(scores.device))
    return int((scores.double() > third + 1.5 * (third - first)).sum())
