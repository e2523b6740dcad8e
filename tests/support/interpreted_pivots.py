"""A command: picks of the Triton kernels against those of the CPU. Run it with ``TRITON_INTERPRET=1``.

Each case is a batch of images that differ in their tokens, gates and seeds.
"""

import torch
from torch import Tensor

from vllm_vtprune.selectors import pivots, pivots_triton


def case(n: int, d: int, k: int, *, rank: int | None = None, slice_tokens: int = 1024, zero_seed: bool = False) -> None:
    generator = torch.Generator().manual_seed(n + k)
    images = 2
    tokens = torch.randn(images, n, d, generator=generator)
    if rank is not None:
        tokens = tokens[..., :rank] @ torch.randn(rank, d, generator=generator)
    tokens += 2 * torch.randn(1, d, generator=generator) * (rank is None)
    if zero_seed:
        tokens[:, 5] = 0
    gate = torch.rand(images, n, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    energy = tokens.double().square().sum(dim=2)
    seeds = torch.tensor([5, n - 1 if not zero_seed else 5])
    spanned = torch.stack([pivots.spanned_below(e) for e in energy])
    found = pivots_triton.pivots(tokens, energy, gate, spanned, seeds, k, slice_tokens)
    for image in range(images):
        expected: Tensor = pivots.weighted_pivots(tokens[image], energy[image], gate[image], int(seeds[image]), k)
        assert found[image].tolist() == expected.tolist(), (n, d, k, rank, slice_tokens, image)


def main() -> None:
    cases = [
        dict(n=64, d=96, k=20),
        dict(n=40, d=96, k=40),
        dict(n=100, d=200, k=30),
        dict(n=100, d=200, k=30, slice_tokens=32),
        dict(n=50, d=100, k=50, slice_tokens=16),
        dict(n=96, d=80, k=1, slice_tokens=32),
        dict(n=60, d=64, k=40, rank=4),
        dict(n=60, d=64, k=40, rank=4, slice_tokens=16),
        dict(n=50, d=64, k=12, zero_seed=True, slice_tokens=16),
    ]
    for arguments in cases:
        case(**arguments)  # type: ignore[arg-type]
    print(f"{len(cases)} cases agree")


if __name__ == "__main__":
    main()
