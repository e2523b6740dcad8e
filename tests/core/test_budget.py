"""Spectral energy against a full SVD, and the fixed budgets."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.energy import energy_rank, spectral_energy
from vllm_vtprune.budget import (
    ROUNDING,
    exact_spectrum,
    krylov_spectrum,
    randomized_spectrum,
    spectrum,
    token_budget,
)
from vllm_vtprune.features import Tiles, VisualFeatures
from vllm_vtprune.plan import plan_tokens
from vllm_vtprune.policy import EnergyBudget, PruningPolicy, RatioBudget, TokensBudget

THRESHOLDS = (0.5, 0.9, 0.99, 0.998, 0.9999)


def with_energies(energies: Tensor, n: int, d: int) -> Tensor:
    """An ``(n, d)`` matrix with these squared singular values."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(n, len(energies), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(d, len(energies), generator=generator))
    return torch.as_tensor((left * energies.sqrt()) @ right.T)


def encoder_like(n: int, d: int) -> Tensor:
    """A spectrum that falls like an encoder's: half in one direction, then exponential decay."""
    energies = torch.exp(-14 * torch.arange(min(n, d)) / min(n, d))
    energies[0] = energies.sum()
    return with_energies(energies, n, d)


def reference_rank(features: Tensor, threshold: float) -> int:
    return rank_of(torch.linalg.svdvals(features.double()).square(), threshold)


def rank_of(energies: Tensor, threshold: float) -> int:
    return int((energies.cumsum(0) / energies.sum() >= threshold).nonzero()[0]) + 1


@pytest.mark.parametrize(("n", "d"), [(576, 1024), (200, 64), (64, 200), (50, 50), (1, 30), (30, 1), (1, 1)])
def test_exact_rank_is_that_of_the_full_svd(n: int, d: int) -> None:
    features = encoder_like(n, d)
    energies = torch.linalg.svdvals(features.double()).square()
    decomposition = exact_spectrum(features)
    for threshold in THRESHOLDS:
        assert decomposition.rank_at(threshold) == rank_of(energies, threshold)
    assert energy_rank(features, 0.99, "exact") == rank_of(energies, 0.99)


@settings(max_examples=30)
@given(n=st.integers(1, 24), d=st.integers(1, 24), seed=st.integers(0, 1000), threshold=st.floats(0.01, 0.999))
def test_rank_is_the_fewest_that_reach_the_threshold(n: int, d: int, seed: int, threshold: float) -> None:
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    k = energy_rank(features, threshold, "exact")
    assert 1 <= k <= min(n, d)
    assert spectral_energy(features, k) >= threshold - 1e-12
    assert k == 1 or spectral_energy(features, k - 1) < threshold


def test_one_spectrum_answers_everything() -> None:
    features = encoder_like(100, 60)
    energies = torch.linalg.svdvals(features.double()).square()
    decomposition = exact_spectrum(features)
    torch.testing.assert_close(decomposition.energies, energies, rtol=1e-9, atol=1e-12)
    assert decomposition.energy_at(0) == 0
    assert decomposition.energy_at(7) == pytest.approx(float(energies[:7].sum() / energies.sum()), abs=1e-12)
    assert decomposition.energy_at(60) == decomposition.energy_at(1000) == 1


def test_threshold_one_is_the_numerical_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(80, 7, generator=generator, dtype=torch.float64) @ torch.randn(
        7, 50, generator=generator, dtype=torch.float64
    )
    assert energy_rank(low_rank, 1.0, "exact") == 7
    assert energy_rank(torch.eye(9), 1.0) == 9
    assert energy_rank(torch.ones(9, 4), 1.0) == 1


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_neither_scale_nor_dtype_nor_transposition_matters(scale: float) -> None:
    features = encoder_like(90, 40).to(torch.bfloat16)
    expected = energy_rank(features, 0.99)
    assert energy_rank(features.float(), 0.99) == expected
    assert energy_rank(features.double() * scale, 0.99) == expected
    assert energy_rank(features.T, 0.99) == expected
    shuffled = features[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert energy_rank(shuffled, 0.99) == expected


@pytest.mark.parametrize("falls_over", [20, 40, 60])
def test_the_papers_solver_is_within_one_token_on_exponential_spectra(falls_over: int) -> None:
    features = with_energies(torch.exp(-torch.arange(576) / falls_over), 576, 1024)
    exact = reference_rank(features, 0.99)
    assert exact <= 280
    assert exact <= energy_rank(features, 0.99, "rsvd", 300, 2, torch.Generator().manual_seed(0)) <= exact + 1


@pytest.mark.parametrize("exponent", [0.8, 1.2, 1.6, 2.0])
def test_the_papers_solver_is_within_two_percent_on_power_laws(exponent: float) -> None:
    """Exact but where the rank comes near the 300 components: 265 for 260 in the worst case here."""
    features = with_energies(torch.arange(1.0, 577) ** -exponent, 576, 1024)
    decomposition = exact_spectrum(features)
    for threshold in (0.9, 0.99, 0.998):
        exact = decomposition.rank_at(threshold)
        rank = energy_rank(features, threshold, "rsvd", 300, 2, torch.Generator().manual_seed(0))
        assert exact <= rank <= 1.02 * exact
        assert rank == exact or 250 < exact < 300


@pytest.mark.parametrize("shared", [pytest.param(0.0, marks=pytest.mark.verify), 1.0])
@pytest.mark.parametrize(("n", "d"), [(576, 1024), (1200, 1100)])
@pytest.mark.parametrize("spectrum_of", [lambda i: torch.exp(-i / 30), lambda i: torch.exp(-i / 90), lambda i: i**-1.2])
def test_auto_is_within_one_percent(spectrum_of: Callable[[Tensor], Tensor], n: int, d: int, shared: float) -> None:
    energies = spectrum_of(torch.arange(1.0, min(n, d) + 1))
    features = with_energies(energies, n, d)
    features += shared * torch.randn(1, d, generator=torch.Generator().manual_seed(1)) * (energies.sum() / n / d) ** 0.5
    decomposition = exact_spectrum(features)
    for threshold in THRESHOLDS:
        exact = decomposition.rank_at(threshold)
        assert abs(energy_rank(features, threshold) - exact) <= 0.01 * exact


def test_a_subspace_settles_what_falls_fast_and_declines_a_power_law() -> None:
    place = torch.arange(1.0, 1101)
    fast, slow = (with_energies(energies, 1200, 1100) for energies in (torch.exp(-place / 20), place**-1.2))
    decomposition = krylov_spectrum(fast, 0.99, torch.Generator().manual_seed(0))
    assert len(decomposition.energies) < 1100 * 3 / 8
    assert decomposition.rank_at(0.99) == reference_rank(fast, 0.99)
    assert krylov_spectrum(slow, 0.99, torch.Generator().manual_seed(0)) is None


@pytest.mark.parametrize("shared", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("falls", [0.0, 0.5])
def test_float32_sums_in_any_order_are_within_the_rounding_allowed(falls: float, shared: float) -> None:
    """One product after the other, as no library does it: the sums of leading eigenvalues are off by less."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12_000, 40, generator=generator) * torch.arange(1, 41) ** -falls
    features += shared * torch.randn(1, 40, generator=generator)
    gram = torch.zeros(40, 40)
    for row in features:
        gram.addr_(row, row)
    exact = exact_spectrum(features)
    eigenvalues = torch.linalg.eigvalsh(gram.double()).flip(0)
    assert float((eigenvalues.cumsum(0) - exact.energies.cumsum(0)).abs().amax()) < ROUNDING * exact.total


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.verify), 20, 100])
@pytest.mark.parametrize("threshold", [0.99, 1.0])
def test_large_matrices_of_low_rank(rank: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1100, rank, generator=generator) @ torch.randn(rank, 1024, generator=generator)
    exact = energy_rank(features, threshold, "exact")
    off_by = 1 if threshold == 1.0 else 0.01 * exact  # all of the energy: where zero begins is a matter of rounding
    assert abs(energy_rank(features, threshold) - exact) <= off_by


@pytest.mark.parametrize("threshold", [0.998, 0.9999])
@pytest.mark.parametrize(
    ("rank", "decay"),
    [(64, 0.05), *(pytest.param(*more, marks=pytest.mark.verify) for more in ((80, 0.05), (90, 0.05))), (200, 0.02)],
)
def test_large_matrices_of_low_rank_whose_energies_fall(rank: int, decay: float, threshold: float) -> None:
    """What no direction is left for must not be counted again."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.exp(-decay * torch.arange(rank))
    features = (torch.randn(1100, rank, generator=generator) * weights) @ torch.randn(rank, 1024, generator=generator)
    exact = energy_rank(features, threshold, "exact")
    for seed in range(2):
        estimate = energy_rank(features, threshold, generator=torch.Generator().manual_seed(seed))
        assert abs(estimate - exact) <= 0.01 * exact


def test_rsvd_is_exact_where_the_threshold_is_within_rounding_of_all_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in (64, 80))
    features = left * torch.tensor([3.0, 1.0, 1e-3, 1e-3]) @ right.T
    for seed in range(6):
        assert energy_rank(features, 1.0, "rsvd", 8, generator=torch.Generator().manual_seed(seed)) == energy_rank(
            features, 1.0, "exact"
        )


def test_features_that_are_being_trained_have_a_rank_too() -> None:
    features = encoder_like(1100, 1024)
    assert energy_rank(features.clone().requires_grad_(), 0.99) == energy_rank(features, 0.99)


def test_without_power_iterations_the_rank_is_overestimated() -> None:
    features = with_energies(torch.arange(1, 301).pow(-1.4), 300, 400)
    exact = reference_rank(features, 0.9)
    rough, fine = (
        energy_rank(features, 0.9, "rsvd", exact + 14, power_iterations, torch.Generator().manual_seed(0))
        for power_iterations in (0, 2)
    )
    assert exact <= fine <= exact + 2
    assert rough > 1.2 * exact


def test_randomized_spectrum_keeps_the_exact_total() -> None:
    features = encoder_like(120, 200)
    decomposition = randomized_spectrum(features, 20, generator=torch.Generator().manual_seed(0))
    assert decomposition.total == pytest.approx(float(features.double().square().sum()), rel=1e-12)
    assert len(decomposition.energies) == 20
    assert decomposition.rank_at(0.9999) is None
    true = torch.linalg.svdvals(features.double()).square()[:20]
    assert bool((decomposition.energies <= true * (1 + 1e-5)).all())


def test_too_few_components_grow_instead_of_guessing() -> None:
    features = encoder_like(300, 400)
    exact = reference_rank(features, 0.99)
    assert exact > 16
    grown = spectrum(features, 0.99, "rsvd", rank=2, generator=torch.Generator().manual_seed(0))
    assert exact <= (grown.rank_at(0.99) or 0) <= exact * 1.1 + 1
    assert energy_rank(features, 1.0, "rsvd", rank=2) == energy_rank(features, 1.0, "exact")


def test_randomized_ranks_repeat_with_their_seed() -> None:
    features = encoder_like(200, 300)
    ranks = {energy_rank(features, 0.97, "rsvd", 40, 0, torch.Generator().manual_seed(3)) for _ in range(3)}
    assert len(ranks) == 1


@pytest.mark.parametrize("solver", ["auto", "exact", "rsvd"])
def test_zero_matrix_has_rank_one(solver: str) -> None:
    assert energy_rank(torch.zeros(8, 5), 0.99, solver, rank=2) == 1  # type: ignore[arg-type]
    assert token_budget(EnergyBudget(min_tokens=3), VisualFeatures(torch.zeros(8, 5), torch.zeros(8, 5))) == (3, 1.0)


@pytest.mark.parametrize(
    ("features", "threshold", "solver", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), 0.9, "exact", "finite"),
        (torch.tensor([[1.0, float("inf")]]), 0.9, "rsvd", "finite"),
        (torch.zeros(0, 4), 0.9, "auto", "non-empty matrix"),
        (torch.zeros(4), 0.9, "auto", "non-empty matrix"),
        (torch.eye(4), 0.0, "auto", "threshold"),
        (torch.eye(4), 1.5, "auto", "threshold"),
        (torch.eye(4), float("nan"), "auto", "threshold"),
        (torch.eye(4), 0.9, "magic", "solver"),
    ],
)
def test_bad_input_is_a_value_error(features: Tensor, threshold: float, solver: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        energy_rank(features, threshold, solver)  # type: ignore[arg-type]


def image(n: int) -> VisualFeatures:
    features = encoder_like(n, 32)
    return VisualFeatures(features, features)


def test_energy_budget_is_clamped_and_measured_at_its_count() -> None:
    features = image(100)
    wanted = reference_rank(features.encoder, 0.9)
    assert 1 < wanted < 30
    for budget, k in (
        (EnergyBudget(threshold=0.9, min_tokens=1), wanted),
        (EnergyBudget(threshold=0.9, min_tokens=30), 30),
        (EnergyBudget(threshold=0.9, min_tokens=1, max_tokens=wanted - 1), wanted - 1),
        (EnergyBudget(threshold=0.9, min_tokens=500), 100),
        (EnergyBudget(threshold=0.9, min_tokens=30, solver="rsvd", rank=2), 30),
    ):
        got, energy = token_budget(budget, features)
        assert got == k
        assert energy == pytest.approx(spectral_energy(features.encoder, k), abs=0.01)


def test_energy_budget_looks_at_the_encoder_features() -> None:
    features = VisualFeatures(torch.ones(40, 8), encoder_like(40, 32))
    assert token_budget(EnergyBudget(min_tokens=1), features) == (1, pytest.approx(1.0, abs=1e-6))


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [
        (1.0, 9, 9), (0.5, 9, 5), (0.5, 1, 1), (0.001, 10, 1), (1 / 9, 576, 64), (2 / 9, 576, 128), (1 / 3, 576, 192),
        (0.145, 100, 15), (0.144, 100, 14), (0.1, 5, 1), (0.3, 5, 2), (1, 7, 7),
    ],
)  # fmt: skip
def test_ratio_rounds_half_up_and_keeps_at_least_one(keep: float, n: int, k: int) -> None:
    assert token_budget(RatioBudget(keep=keep), VisualFeatures(torch.ones(n, 1), torch.ones(n, 1))) == (k, None)


@pytest.mark.parametrize(("keep", "k"), [(1, 1), (9, 9), (10, 10), (11, 10), (10**6, 10)])
def test_tokens_are_at_most_all(keep: int, k: int) -> None:
    assert token_budget(TokensBudget(keep=keep), VisualFeatures(torch.ones(10, 1), torch.ones(10, 1))) == (k, None)


@pytest.mark.parametrize("solver", ["auto", "exact", "rsvd"])
def test_the_overview_sets_the_share_of_all_tiles(solver: str) -> None:
    overview = encoder_like(64, 96)
    others = torch.randn(150, 96, generator=torch.Generator().manual_seed(1))  # a spectrum of their own
    ids = torch.tensor([0] * 100 + [2] * 64 + [1] * 50)
    boxes = ((0.0, 0.0, 1.0, 0.6), (0.0, 0.6, 1.0, 1.0), None)
    features = VisualFeatures(
        torch.cat([others[:100], overview, others[100:]]),
        torch.randn(214, 8),
        tiles=Tiles(ids, ((10, 10), (5, 10), (8, 8)), boxes),
    )
    rank = reference_rank(overview, 0.9)
    assert rank != reference_rank(features.encoder, 0.9)
    expected = math.floor(rank / 64 * 214 + 0.5)

    def budget(**bounds: int | None) -> tuple[int, float | None]:
        fields = {"min_tokens": 1, **bounds}
        return token_budget(EnergyBudget(threshold=0.9, solver=solver, **fields), features)  # type: ignore[arg-type]

    assert budget() == (expected, pytest.approx(spectral_energy(overview, rank), abs=1e-4))
    assert budget(min_tokens=200) == (200, pytest.approx(spectral_energy(overview, 60), abs=1e-4))
    assert budget(max_tokens=10) == (10, pytest.approx(spectral_energy(overview, 3), abs=1e-3))
    assert budget(min_tokens=9999)[0] == 214
    unknown = replace(features, tiles=Tiles(ids, ((10, 10), (5, 10), (8, 8))))  # it is not known which is the overview
    assert token_budget(EnergyBudget(threshold=0.9, min_tokens=1), unknown)[0] == reference_rank(features.encoder, 0.9)


@pytest.mark.parametrize("method", ["random3x3", "maxpool3x3", "skip"])
def test_the_energy_is_that_of_what_a_method_keeps_at_most(method: str) -> None:
    """Not that of what the budget would have kept."""
    matrix = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    features = VisualFeatures(matrix, matrix, grid=(5, 6), cls_attention=torch.rand(30))
    policy = PruningPolicy.parse({"method": method, "budget": {"type": "energy", "threshold": 0.999, "min_tokens": 1}})
    plan = plan_tokens(features, policy)
    assert plan.energy == pytest.approx(spectral_energy(matrix, plan.budget))
    assert plan.energy < 0.999
