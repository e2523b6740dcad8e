"""Count outliers, for methods with their own count."""

from vllm_vtprune.lazy import Tensor, torch


def upper_outliers(scores: Tensor, rounding: float = 0.0) -> int:
    """How many of ``scores (N,)`` exceed the third quartile by 1.5 interquartile ranges plus ``rounding``."""
    first, third = torch.quantile(scores.double(), torch.tensor([0.25, 0.75], dtype=torch.float64).to(scores.device))
    return int((scores.double() > third + 1.5 * (third - first) + rounding).sum())
