"""Every method through the laws it declares. A new method is one more row in ``CASES``."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import isqrt, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.energy import energy_rank
from vllm_vtprune import PruningPlan, PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.selectors import METHODS, SELECTORS

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "resprune": ("resprune", {}),
    "resprune-clip": ("resprune", {"gate": "clip"}),
    "resprune-no-text": ("resprune", {"alpha": 0}),
    "resprune-relevance-only": ("resprune", {"rank_by": "relevance"}),
    "resprune-mean-seed": ("resprune", {"seed_token": "mean", "relevance": "mean_token"}),
    "resprune-encoder": ("resprune", {"features": "encoder"}),
    "resprune-both": ("resprune", {"features": "both"}),
    "divprune-encoder": ("divprune", {"features": "encoder"}),
    "divprune-both": ("divprune", {"features": "both"}),
    "adaptprune": ("adaptprune", {}),
    "adaptprune-relevance": ("adaptprune", {"importance": "relevance", "similarity": False}),
    "adaptprune-residual": ("adaptprune", {"importance": "residual", "distance": False, "sigma_s": 0.5}),
    "adaptprune-norm": ("adaptprune", {"importance": "norm", "correction": False}),
    **{name: (name, {}) for name in "divprune cdpruner scope leverage dart fastervlm vispruner hired".split()},
    **{name: (name, {}) for name in "visionzip prumerge trim tome pool".split()},
    "cover": ("cover", {}),
    "cover-norm": ("cover", {"importance": "norm"}),
    "cover-relevance": ("cover", {"importance": "relevance"}),
    "skip": ("skip", {}),
    "random3x3": ("random3x3", {"importance": "norm"}),
    "maxpool3x3": ("maxpool3x3", {}),
    "avgpool": ("avgpool", {"importance": "residual"}),
    "avgpool-relevance": ("avgpool", {"importance": "relevance", "relevance": "mean"}),
    "last": ("last", {}),
    "random": ("random", {"seed": 5}),
    "uniform": ("uniform", {}),
}
# Text is one weight of several, and never the last word.
GATED = ("resprune", "resprune-mean-seed")
# Which tokens a small budget keeps is not a part of what a larger one keeps.
NOT_NESTED = {"dart", "vispruner", "visionzip", "tome", "pool", "uniform"}
METHOD_CASES = pytest.mark.parametrize("case", CASES)
TEXT = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
TILES = ((4, 6), (2, 6), (3, 4))
BOXES = (None, (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
TENSORS = ("encoder", "embeds", "cls_attention", "overview_attention", "keys")


def test_every_method_has_a_row() -> None:
    assert {method for method, _ in CASES.values()} == set(SELECTORS)


def image(n: int = 48, grid: tuple[int, int] | None = (6, 8), seed: int = 0, tiled: bool = False) -> VisualFeatures:
    generator = torch.Generator().manual_seed(seed)
    features = VisualFeatures(
        encoder=torch.randn(n, 16, generator=generator),
        embeds=torch.randn(n, 64, generator=generator),
        grid=grid,
        cls_attention=torch.rand(n, generator=generator),
        keys=torch.randn(n, 8, generator=generator),
    )
    if not tiled:
        return features
    ids = torch.arange(len(TILES)).repeat_interleave(torch.tensor([prod(tile) for tile in TILES]))
    overview = torch.rand(24, generator=generator)
    return replace(features, grid=None, tiles=Tiles(ids, TILES, BOXES), overview_attention=overview)


def changed(features: VisualFeatures, change: Callable[[Tensor], Tensor], *names: str) -> VisualFeatures:
    values = {name: getattr(features, name) for name in names}
    return replace(features, **{name: change(value) for name, value in values.items() if value is not None})


def expected_count(case: str, features: VisualFeatures, k: int) -> int:
    return min(k, METHODS[CASES[case][0]].max_keep(features))


def run(case: str, features: VisualFeatures, k: int, text: Tensor | None = TEXT) -> PruningPlan:
    method, fields = CASES[case]
    budget = {"type": "tokens", "keep": k}
    policy = PruningPolicy.parse({"method": method, "budget": budget, **fields})
    plan = plan_tokens(features, policy, text)
    expected = expected_count(case, features, k)
    assert plan.budget == expected
    assert plan.kept.tolist() == sorted(set(plan.kept.tolist()))
    assert len(plan.kept) == len(plan.embeds) == expected
    assert int(plan.kept[0]) >= 0
    assert int(plan.kept[-1]) < features.num_tokens
    assert plan.order.sort().values.tolist() == plan.kept.tolist()
    assert plan.kept.dtype == plan.order.dtype == torch.int64
    assert plan.embeds.dtype == features.embeds.dtype
    if expected == features.num_tokens or not METHODS[method].merges:
        assert torch.equal(plan.embeds, features.embeds[plan.kept])
    assert plan.embeds.isfinite().all()
    assert plan.energy is None
    assert all(seconds >= 0 for seconds in plan.timings.values())
    return plan


@METHOD_CASES
@pytest.mark.parametrize("tiled", [False, True])
def test_keeps_exactly_k(case: str, tiled: bool) -> None:
    for k in (1, 2, 3, 17, 46, 47, 48, 49, 1000):
        run(case, image(tiled=tiled), k)


@METHOD_CASES
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_tokens(case: str, n: int) -> None:
    for k in range(1, n + 1):
        run(case, image(n, grid=(1, n)), k)
        run(case, image(n, grid=(n, 1)), k, None)


@METHOD_CASES
@pytest.mark.parametrize("tiled", [False, True])
def test_deterministic_and_leaves_its_input_alone(case: str, tiled: bool) -> None:
    features, untouched = image(tiled=tiled), image(tiled=tiled)
    first, second = run(case, features, 20), run(case, untouched, 20)
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.embeds, second.embeds)
    for name in TENSORS:
        if getattr(untouched, name) is not None:
            assert torch.equal(getattr(features, name), getattr(image(tiled=tiled), name)), name


@METHOD_CASES
def test_neighbours_in_a_batch_do_not_matter(case: str) -> None:
    """An image's features may be rows of a batch, with another image planned in between."""
    images = [image(seed=seed) for seed in range(3)]
    batch = {name: torch.stack([getattr(i, name) for i in images], dim=1) for name in TENSORS if name[0] != "o"}
    for i, alone in enumerate(images):
        strided = replace(alone, **{name: stacked[:, i] for name, stacked in batch.items()})
        assert not strided.embeds.is_contiguous()
        first, second = run(case, alone, 20), run(case, strided, 20)
        assert torch.equal(first.order, second.order)
        torch.testing.assert_close(first.embeds, second.embeds)


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_NESTED])
def test_a_larger_budget_only_adds(case: str) -> None:
    assert run(case, image(), 30).order[:12].tolist() == run(case, image(), 12).order.tolist()


@METHOD_CASES
@pytest.mark.parametrize("scale", [1e-6, 0.37, 1e6])
def test_scale_does_not_matter(case: str, scale: float) -> None:
    features = image()
    plan = run(case, features, 20)
    for names in (("embeds",), ("encoder", "embeds", "keys")):
        scaled = run(case, changed(features, lambda t: t * scale, *names), 20)
        assert torch.equal(scaled.order, plan.order)
        torch.testing.assert_close(scaled.embeds / scale, plan.embeds)


@pytest.mark.parametrize("case", [case for case, (method, _) in CASES.items() if METHODS[method].equivariant])
def test_permuted_tokens_give_permuted_picks(case: str) -> None:
    features = image()
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    for k in (1, 2, 20, 47):
        plan, shuffled = run(case, features, k), run(case, changed(features, lambda t: t[shuffle], *TENSORS), k)
        assert shuffle[shuffled.order].tolist() == plan.order.tolist()
        same_order = shuffle[shuffled.kept].argsort()
        torch.testing.assert_close(shuffled.embeds[same_order], plan.embeds)


@METHOD_CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_decide_on_their_exact_values(case: str, dtype: torch.dtype) -> None:
    features = changed(image(), lambda t: t.to(torch.bfloat16).to(dtype), *TENSORS)
    plan = run(case, features, 20, TEXT.to(dtype))
    text = TEXT.to(dtype).float()
    exact = run(case, changed(features, lambda t: t.float(), *TENSORS), 20, text)
    assert torch.equal(plan.order, exact.order)
    torch.testing.assert_close(plan.embeds, exact.embeds.to(dtype))


@METHOD_CASES
@pytest.mark.parametrize("k", [1, 5, 48])
def test_degenerate_tokens(case: str, k: int) -> None:
    def some_zero(rows: Tensor) -> Tensor:
        return rows.index_fill(0, torch.arange(0, 48, 3), 0.0)

    def of_rank_two(rows: Tensor) -> Tensor:
        return rows[:, :2] @ rows[:2] if rows.ndim == 2 else rows

    for degenerate in (
        torch.zeros_like,
        torch.ones_like,
        lambda rows: rows[:1].expand(48, *rows.shape[1:]),
        lambda rows: rows[:4].repeat(12, *[1] * (rows.ndim - 1)),
        some_zero,
        of_rank_two,
    ):
        for names in (("embeds",), TENSORS):
            for text in (TEXT, torch.zeros(2, 64), None):
                run(case, changed(image(), degenerate, *names), k, text)


@METHOD_CASES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_an_error_where_it_is_read(case: str, bad: float) -> None:
    def spoilt(rows: Tensor) -> Tensor:
        return rows.index_fill(0, torch.tensor([7]), bad)

    for name in TENSORS:
        features = changed(image(tiled=True), spoilt, name)
        if name == "embeds" or name in PruningPolicy.parse({"method": CASES[case][0], **CASES[case][1]}).reads:
            with pytest.raises(ValueError, match=f"{name} must be finite"):
                run(case, features, 5)
        else:
            run(case, features, 5)


@METHOD_CASES
def test_what_it_needs_is_named_and_nothing_else_is_needed(case: str) -> None:
    method, _ = CASES[case]
    needs = METHODS[method].needs - {"encoder"}
    bare = VisualFeatures(image().encoder, image().embeds)
    inputs = {
        "cls_attention": {"cls_attention": image().cls_attention},
        "keys": {"keys": image().keys},
        "positions": {"grid": (6, 8)},
    }
    for need in needs:
        others = {name: value for other in needs - {need} for name, value in inputs[other].items()}
        with pytest.raises(PolicyError, match=f"pruning.method: method {method} needs {need}") as raised:
            run(case, replace(bare, **others), 5)
        assert raised.value.value == method
        accepted = raised.value.accepted.removeprefix("one of ").split(", ")
        assert {"none", "resprune", "random"} <= set(accepted)
        assert method not in accepted
    run(case, replace(bare, **{name: value for need in needs for name, value in inputs[need].items()}), 5)
    assert "text" not in needs, "without a text a method falls back"


@METHOD_CASES
def test_text_matters_only_where_the_policy_says_so(case: str) -> None:
    method, fields = CASES[case]
    conditions = PruningPolicy.parse({"method": method, **fields}).conditions_on_text
    same = torch.equal(run(case, image(), 20).order, run(case, image(), 20, None).order)
    assert same != conditions


@pytest.mark.parametrize("case", GATED)
@pytest.mark.parametrize("unlike", [0, 7, 47])
def test_no_token_is_excluded_by_the_text(case: str, unlike: int) -> None:
    """What only one token shows is kept among the first, however little that token is like the text."""
    embeds = image().embeds.clone()
    embeds[:, -1] = 0
    embeds[unlike] = 0
    embeds[unlike, -1] = 100.0
    text = torch.cat([embeds.sum(dim=0)[:-1], torch.tensor([-100.0])])[None]
    assert unlike in run(case, replace(image(), embeds=embeds), 3, text).kept.tolist()


@pytest.mark.parametrize("case", [*GATED, "cdpruner"])
def test_constant_relevance_changes_nothing(case: str) -> None:
    features = changed(image(), lambda rows: rows.index_fill(1, torch.tensor([63]), 0.0), "embeds")
    like_all_alike = torch.eye(64)[63:]  # orthogonal to every token
    assert torch.equal(run(case, features, 20, like_all_alike).order, run(case, features, 20, None).order)


@pytest.mark.parametrize("case", GATED)
def test_relevance_that_hardly_varies_hardly_matters(case: str) -> None:
    """Residual energies that differ by a tenth decide against cosines that differ by a thousandth."""
    cosines = torch.linspace(0.5, 0.501, 8, dtype=torch.float64)
    embeds = torch.eye(9, dtype=torch.float64)[:8] * (1 - cosines.square()).sqrt()[:, None]
    embeds[:, 8] = 0.0
    lengths = 1.1 ** torch.arange(7, -1, -1, dtype=torch.float64)[:, None].sqrt()
    features = VisualFeatures((embeds * lengths).float(), (embeds * lengths).float())
    text = torch.zeros(1, 9)
    text[0, 8] = 1.0
    text[0, :8] = (cosines / (1 - cosines.square()).sqrt()).float()
    assert run(case, features, 8, text).order.tolist() == run(case, features, 8, None).order.tolist()


@METHOD_CASES
def test_an_image_all_of_whose_cosines_are_negative(case: str) -> None:
    features = changed(image(), lambda rows: rows.abs() + 0.1, "embeds")
    against = -torch.eye(64)[:3] - 0.01
    order = run(case, features, 20, against).order.tolist()
    if case in GATED:  # the text still tells tokens apart
        assert order != run(case, features, 20, None).order.tolist()
        assert order != sorted(order)


@METHOD_CASES
def test_takes_the_count_from_the_energy_budget(case: str) -> None:
    method, fields = CASES[case]
    decaying = torch.arange(1, 17).pow(-1.0)
    counts = []
    for threshold in (0.7, 0.9, 0.99):
        features = changed(image(), lambda t: t * decaying, "encoder")
        budget = {"threshold": threshold, "min_tokens": 1}
        policy = PruningPolicy.parse({"method": method, "budget": budget, **fields})
        plan = plan_tokens(features, policy, TEXT)
        counts.append(plan.budget)
        assert len(plan.kept) == len(plan.embeds) == plan.budget
        assert plan.budget == expected_count(case, features, energy_rank(features.encoder, threshold))
        assert plan.energy is not None
    assert len(set(counts)) > 1


@METHOD_CASES
@settings(max_examples=15)
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


SIZES = (1, 2, 3, 5, 16, 63, 64, 65, 144, 255, 256, 576, 1023, 1024, 2304, 2880, 4095, 4096)
SHARES = (0.0, 1 / 9, 1 / 4, 1 / 2, 1.0)
LARGE = [(c, n, s) for c, n, s in product(CASES, SIZES, SHARES) if n <= 1024 or s <= 1 / 9]


def test_up_to_4096_tokens(record_property: Callable[[str, object], None]) -> None:
    """A fixed sample of methods, sizes and budgets; all of them where VTPRUNE_VERIFY is set."""
    grid = LARGE if os.environ.get("VTPRUNE_VERIFY") else random.Random(4).sample(LARGE, 40)
    for case, n, share in grid:
        k = max(1, round(share * n))
        print(f"{case}: {k} of {n}")
        rows = next(r for r in range(isqrt(n), 0, -1) if n % r == 0)
        run(case, image(n, (rows, n // rows)), k)
    record_property("selector_sizes", len(grid))


def test_random_follows_its_seed() -> None:
    def order(seed: int) -> list[int]:
        fields = {"method": "random", "budget": {"type": "tokens", "keep": 20}, "seed": seed}
        return plan_tokens(image(), PruningPolicy.parse(fields)).order.tolist()

    assert order(0) == order(0) != order(1)


def test_uniform_spreads_over_rows_and_columns() -> None:
    features = image(64, (8, 8))
    assert run("uniform", features, 16).kept.tolist() == [8 * r + c for r in (1, 3, 5, 7) for c in (1, 3, 5, 7)]
    rows = [int(p) // 8 for p in run("uniform", features, 11).kept]
    assert max(rows.count(r) for r in set(rows)) - min(rows.count(r) for r in set(rows)) <= 1
    assert run("uniform", image(48, None), 4).kept.tolist() == [6, 18, 30, 42]
