"""How many scores stand out: the count of methods that find their own."""

from vllm_vtprune.lazy import Tensor, torch


def upper_outliers(scores: Tensor, rounding: float = 0.0) -> int:
    """How many of ``scores (N,)`` lie 1.5 interquartile ranges and over ``rounding`` above the third quartile."""
    first, third = torch.quantile(scores.double(), torch.tensor([0.25, 0.75], dtype=torch.float64).to(scores.device))
    return int((scores.double() > third + 1.5 * (third - first) + rounding).sum())
