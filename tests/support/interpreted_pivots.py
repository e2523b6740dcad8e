"""A command: the GPU's form of the picks on a CPU, its kernel interpreted. Run it with ``TRITON_INTERPRET=1``."""

import torch

from vllm_vtprune.selectors import pivots, pivots_triton


def draft_case(m: int, count: int, rank: int) -> None:
    """The kernel's steps against NumPy's."""
    generator = torch.Generator().manual_seed(m + rank)
    tokens = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    gram = tokens @ tokens.T
    energy = gram.diagonal().clone()
    gate = torch.rand(m, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    spanned = pivots.spanned_below(energy)
    seed = int(torch.randint(m, (1,), generator=generator))
    expected = pivots._steps(gram.numpy(), energy.numpy(), gate.numpy(), spanned.numpy(), seed, count)
    found = pivots_triton.draft(gram, energy, gate, spanned, torch.tensor([seed]), count)
    assert found.tolist() == expected, (m, count, rank)
    assert len(expected) == min(m, count, rank)


def picks_case(
    n: int, d: int, k: int, rank: int | None = None, shared: float = 2.0, copies: int = 1, zero_seed: bool = False
) -> None:
    """All picks of an image, in the GPU's panels and in the CPU's."""
    generator = torch.Generator().manual_seed(n + k)
    tokens = torch.randn(n // copies, d, generator=generator).repeat(copies, 1)
    if rank is None:
        tokens += shared * torch.randn(1, d, generator=generator)
    else:
        tokens = tokens[:, :rank] @ torch.randn(rank, d, generator=generator)
    seed = 5
    if zero_seed:
        tokens[seed] = 0
    gate = torch.rand(n, generator=generator, dtype=torch.float64).clamp(min=1e-3)
    energy = tokens.double().square().sum(dim=1)
    factorisation = pivots._Factorisation(tokens, energy, gate, pivots.spanned_below(energy), k)
    factorisation.on_cpu = False
    found = factorisation.run(seed)
    assert found.tolist() == pivots.weighted_pivots(tokens, energy, gate, seed, k).tolist(), (n, d, k, rank, shared)


def main() -> None:
    drafts = [(1, 1, 4), (7, 5, 9), (16, 16, 3), (100, 64, 90), (128, 64, 200), (128, 64, 2), (33, 20, 20)]
    images = [
        dict(n=64, d=96, k=20),
        dict(n=40, d=96, k=40),
        dict(n=300, d=200, k=150),
        dict(n=96, d=80, k=1),
        dict(n=60, d=64, k=40, rank=4),
        dict(n=160, d=40, k=160),
        dict(n=100, d=200, k=60, shared=100.0),
        dict(n=120, d=64, k=90, copies=3),
        dict(n=50, d=64, k=12, zero_seed=True),
    ]
    for m, count, rank in drafts:
        draft_case(m, count, rank)
    for image in images:
        picks_case(**image)  # type: ignore[arg-type]
    print(f"{len(drafts) + len(images)} cases agree")


if __name__ == "__main__":
    main()
