"""Every method through the laws it declares. A new method is one more row in ``CASES``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.selectors import METHODS

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "resprune": ("resprune", {}),
    "resprune-no-text": ("resprune", {"alpha": 0}),
    "resprune-relevance-only": ("resprune", {"rank_by": "relevance"}),
    "resprune-mean-seed": ("resprune", {"seed_token": "mean", "relevance": "mean_token"}),
    "random": ("random", {"seed": 5}),
    "uniform": ("uniform", {}),
}
SPACED_BY_BUDGET = {"uniform"}  # the positions depend on how many are wanted
METHOD_CASES = pytest.mark.parametrize("case", CASES)
TEXT = torch.randn(3, 24, generator=torch.Generator().manual_seed(9))


def test_every_method_has_a_row() -> None:
    assert {method for method, _ in CASES.values()} == set(METHODS)


def image(n: int = 48, grid: tuple[int, int] | None = (6, 8), seed: int = 0) -> VisualFeatures:
    generator = torch.Generator().manual_seed(seed)
    return VisualFeatures(
        encoder=torch.randn(n, 16, generator=generator),
        embeds=torch.randn(n, 24, generator=generator),
        grid=grid,
        cls_attention=torch.rand(n, generator=generator),
        keys=torch.randn(n, 8, generator=generator),
    )


def with_embeds(features: VisualFeatures, embeds: Tensor) -> VisualFeatures:
    return VisualFeatures(features.encoder, embeds, features.grid, None, features.cls_attention, keys=features.keys)


def run(case: str, features: VisualFeatures, k: int, text: Tensor | None = TEXT) -> PruningPlan:
    method, fields = CASES[case]
    budget = {"type": "tokens", "keep": k}
    policy = PruningPolicy.parse({"method": method, "budget": budget, **fields})
    plan = plan_tokens(features, policy, text)
    expected = min(k, features.num_tokens)
    spec = METHODS[policy.method]
    if spec.max_keep is not None:
        expected = min(expected, spec.max_keep(features))
    assert plan.budget == expected
    assert plan.kept.tolist() == sorted(set(plan.kept.tolist()))
    assert len(plan.kept) == len(plan.embeds) == expected
    assert int(plan.kept[0]) >= 0
    assert int(plan.kept[-1]) < features.num_tokens
    assert plan.order.sort().values.tolist() == plan.kept.tolist()
    assert plan.kept.dtype == plan.order.dtype == torch.int64
    assert plan.energy is None
    assert all(seconds >= 0 for seconds in plan.timings.values())
    return plan


@METHOD_CASES
@pytest.mark.parametrize("k", [1, 2, 17, 47, 48, 49, 1000])
def test_keeps_exactly_k_rows_unchanged(case: str, k: int) -> None:
    features = image()
    plan = run(case, features, k)
    assert torch.equal(plan.embeds, features.embeds[plan.kept])


@METHOD_CASES
@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tokens(case: str, n: int) -> None:
    for k in range(1, n + 1):
        run(case, image(n, grid=(1, n)), k)


@METHOD_CASES
def test_deterministic_and_leaves_its_input_alone(case: str) -> None:
    features = image()
    before = features.embeds.clone()
    assert torch.equal(run(case, features, 20).order, run(case, image(), 20).order)
    assert torch.equal(features.embeds, before)


@pytest.mark.parametrize("case", [case for case in CASES if case not in SPACED_BY_BUDGET])
def test_a_larger_budget_only_adds_for_greedy_methods(case: str) -> None:
    assert run(case, image(), 30).order[:12].tolist() == run(case, image(), 12).order.tolist()


@METHOD_CASES
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1e6])
def test_scale_does_not_matter(case: str, scale: float) -> None:
    features = image()
    assert torch.equal(
        run(case, with_embeds(features, features.embeds * scale), 20).order, run(case, features, 20).order
    )


@pytest.mark.parametrize("case", [case for case, (method, _) in CASES.items() if METHODS[method].equivariant])
def test_permuted_tokens_give_permuted_picks(case: str) -> None:
    features = image()
    assert features.cls_attention is not None
    assert features.keys is not None
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    shuffled = VisualFeatures(
        features.encoder[shuffle],
        features.embeds[shuffle],
        features.grid,
        cls_attention=features.cls_attention[shuffle],
        keys=features.keys[shuffle],
    )
    assert shuffle[run(case, shuffled, 20).order].tolist() == run(case, features, 20).order.tolist()


@METHOD_CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_decide_on_their_exact_values(case: str, dtype: torch.dtype) -> None:
    features = with_embeds(image(), image().embeds.to(torch.bfloat16).to(dtype))
    plan = run(case, features, 20, TEXT.to(dtype))
    assert plan.embeds.dtype == dtype
    assert torch.equal(plan.embeds, features.embeds[plan.kept])
    text = TEXT.to(dtype).float()
    assert torch.equal(plan.order, run(case, with_embeds(image(), features.embeds.float()), 20, text).order)


@METHOD_CASES
@pytest.mark.parametrize("k", [1, 5, 48])
def test_degenerate_tokens(case: str, k: int) -> None:
    features = image()
    embeds = features.embeds
    zeroed = embeds.clone()
    zeroed[::3] = 0
    for degenerate in (
        torch.zeros_like(embeds),
        torch.ones_like(embeds),
        embeds[:1].expand(48, -1),
        embeds[:4].repeat(12, 1),
        zeroed,
        embeds[:, :2] @ embeds[:2],
    ):
        for text in (TEXT, torch.zeros(2, 24), None):
            run(case, with_embeds(features, degenerate), k, text)


@METHOD_CASES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(case: str, bad: float) -> None:
    features = image()
    embeds = features.embeds.clone()
    embeds[7, 3] = bad
    with pytest.raises(ValueError, match="embeds must be finite"):
        run(case, with_embeds(features, embeds), 5)


@METHOD_CASES
def test_runs_without_a_grid_or_cls_attention_unless_it_needs_them(case: str) -> None:
    needs = METHODS[CASES[case][0]].needs
    bare = image()
    bare = VisualFeatures(bare.encoder, bare.embeds)
    if needs - {"text"}:
        with pytest.raises(ValueError, match="needs"):
            run(case, bare, 5)
    else:
        run(case, bare, 5)


@METHOD_CASES
def test_text_matters_only_where_the_policy_says_so(case: str) -> None:
    method, fields = CASES[case]
    conditions = PruningPolicy.parse({"method": method, **fields}).conditions_on_text
    same = torch.equal(run(case, image(), 20).order, run(case, image(), 20, None).order)
    assert same != conditions


@METHOD_CASES
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    text=st.booleans(),
)
def test_any_shape(case: str, rows: int, columns: int, share: float, seed: int, text: bool) -> None:
    n = rows * columns
    run(case, image(n, (rows, columns), seed), max(1, round(share * n)), TEXT if text else None)


def test_random_follows_its_seed() -> None:
    orders = [
        plan_tokens(
            image(), PruningPolicy.parse({"method": "random", "budget": {"type": "tokens", "keep": 20}, "seed": seed})
        ).order.tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_uniform_spreads_over_rows_and_columns() -> None:
    features = image(64, (8, 8))
    assert run("uniform", features, 16).kept.tolist() == [8 * r + c for r in (1, 3, 5, 7) for c in (1, 3, 5, 7)]
    rows = [int(p) // 8 for p in run("uniform", features, 11).kept]
    assert max(rows.count(r) for r in set(rows)) - min(rows.count(r) for r in set(rows)) <= 1
    assert run("uniform", image(48, None), 4).kept.tolist() == [6, 18, 30, 42]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 12), (12, 1), (3, 5), (7, 2), (9, 9)])
def test_uniform_is_exact_for_every_budget(rows: int, columns: int) -> None:
    features = image(rows * columns, (rows, columns))
    for k in range(1, rows * columns + 1):
        run("uniform", features, k)
