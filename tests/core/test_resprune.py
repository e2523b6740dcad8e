"""ResPrune against the paper's form of it: explicit Gram-Schmidt in float64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.defaults import QWEN
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.policy import LLAVA
from vllm_vtprune.selectors.resprune import ALPHA
from vllm_vtprune.selectors.similarity import text_relevance

VERIFY = pytest.mark.verify
LARGE = [(2880, 4096, 640), (4096, 3584, 1365)]


def reference_order(tokens: Tensor, gate: Tensor, seed: int, k: int) -> list[int]:
    """Eq. 10-16 to the letter: residuals of all tokens, one new orthonormal direction a step."""
    residuals = tokens.double()
    smallest = 1e-5 * residuals.square().sum(dim=1)
    chosen = [seed]
    while len(chosen) < k:
        newest = residuals[chosen[-1]]
        if newest.square().sum() > smallest[chosen[-1]]:
            direction = newest / newest.norm()
            residuals = torch.addr(residuals, residuals @ direction, direction, alpha=-1)
        energies = residuals.square().sum(dim=1)
        scores = torch.where(energies > smallest, energies * gate, -1 / gate)
        scores[chosen] = -torch.inf
        chosen.append(int(scores.argmax()))
    return chosen


def reference_gate(tokens: Tensor, text: Tensor, alpha: float = ALPHA, form: str = "minmax") -> Tensor:
    """Each token's cosine with the noun nearest to it, then as the gate's docstring has it, one token at a time."""
    cosines = (normalize(tokens.double(), dim=1) @ normalize(text.double(), dim=1).T).amax(dim=1).tolist()
    if form == "clip":
        return torch.tensor([min(max(cosine, 1e-6), 1.0) ** alpha for cosine in cosines], dtype=torch.float64)
    spread = max(0.05, max(cosines) - min(cosines))
    weights = [(1 - 0.9 * (max(cosines) - cosine) / spread) ** alpha for cosine in cosines]
    return torch.tensor(weights, dtype=torch.float64)


def policy(k: int, **fields: object) -> PruningPolicy:
    return PruningPolicy.parse({"budget": {"type": "tokens", "keep": k}, **fields})


def image(n: int, d: int, seed: int = 0, correlated: bool = False, **fields: object) -> VisualFeatures:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(n, d, generator=generator)
    if correlated:  # a shared direction and a few strong ones, like a projector's output
        embeds = embeds + 3 * torch.randn(1, d, generator=generator)
        embeds += torch.randn(n, 8, generator=generator) @ torch.randn(8, d, generator=generator)
    tensors = {"encoder": embeds, "cls_attention": torch.rand(n, generator=generator), **fields}
    return VisualFeatures(embeds=embeds, **tensors)  # type: ignore[arg-type]


def text_of(d: int) -> Tensor:
    return torch.randn(2, d, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("gate_form", [None, "minmax", "clip"])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [pytest.param(576, 4096, 128, marks=VERIFY), (576, 512, 128), (100, 40, 30), (64, 2048, 64), (7, 3, 3)],
)
def test_same_order_as_gram_schmidt(n: int, d: int, k: int, correlated: bool, gate_form: str | None) -> None:
    """The literal form in float64: without a text, with the default gate, with the paper's alpha on clipped ones."""
    features = image(n, d, correlated=correlated)
    text = None if gate_form is None else torch.randn(3, d, generator=torch.Generator().manual_seed(1))
    asked, gate = policy(k), torch.ones(n)
    if text is not None and gate_form == "clip":
        asked, gate = policy(k, gate="clip"), reference_gate(features.embeds, text, 0.75, "clip")
    elif text is not None:
        gate = reference_gate(features.embeds, text)
    expected = reference_order(features.embeds, gate, int(features.cls_attention.argmax()), k)
    assert plan_tokens(features, asked, text).order.tolist() == expected


@pytest.mark.parametrize("shared", [30, 55, 100, 160])
@pytest.mark.parametrize("seed", range(6))
def test_same_order_where_tokens_share_nearly_all_their_energy(shared: float, seed: int) -> None:
    """From 99.9 to 99.996 %: what tells them apart is less than the rounding of float32 products of what they share."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(64, 256, generator=generator) + shared * torch.randn(1, 256, generator=generator)
    expected = reference_order(embeds, torch.ones(64), int(embeds.norm(dim=1).argmax()), 40)
    assert plan_tokens(VisualFeatures(embeds, embeds), policy(40)).order.tolist() == expected


@pytest.mark.parametrize("alpha", [0.75, 8, 16])
def test_spanned_tokens_follow_by_gate_however_strong_the_text_is(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.cat([torch.randn(30, 3, generator=generator), torch.zeros(30, 5)], dim=1)
    text = torch.tensor([[0.6, 0.6, 0.6, 30, 0, 0, 0, 0]])
    order = plan_tokens(VisualFeatures(embeds, embeds), policy(30, alpha=alpha), text).order.tolist()
    assert order[3:] == sorted(order[3:], key=lambda i: -float(reference_gate(embeds, text, 1.0)[i]))


@pytest.mark.parametrize("seed_token", ["auto", "relevance", "mean"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 2.0**-60, 1e-8, 3.7, 1e8, 2.0**60, 1e20, 1e30])
def test_scale_of_text_and_tokens_does_not_matter(scale: float, seed_token: str) -> None:
    features, text = image(80, 32), text_of(32)
    scaled, asked = replace(features, embeds=features.embeds * scale), policy(40, seed_token=seed_token)
    without_text, with_text = (plan_tokens(features, asked, embeds).order for embeds in (None, text))
    assert torch.equal(plan_tokens(scaled, asked).order, without_text)
    for tokens, embeds in ((features, text * scale), (scaled, text), (scaled, text * scale)):
        assert torch.equal(plan_tokens(tokens, asked, embeds).order, with_text)


@pytest.mark.parametrize("shared", [0.0, 3.0])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [(576, 4096, 192), (2880, 1024, 640), *(pytest.param(*more, marks=VERIFY) for more in LARGE)],
)
def test_every_pick_of_a_large_image_is_the_best_in_float64(n: int, d: int, k: int, shared: float) -> None:
    """The residuals after each pick from a float64 factorisation in the order of the picks."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(n, d, generator=generator) + shared * torch.randn(1, d, generator=generator)
    order = plan_tokens(VisualFeatures(embeds, embeds), policy(k)).order
    tokens = embeds.double()
    energies = tokens.square().sum(dim=1)
    lower = torch.linalg.cholesky(tokens[order] @ tokens[order].T)
    explained = torch.linalg.solve_triangular(lower, tokens[order] @ tokens.T, upper=False).square().cumsum(dim=0)
    assert int(order[0]) == int(energies.argmax())
    for step in range(1, k):
        left = energies - explained[step - 1]
        left[order[:step]] = -torch.inf
        assert int(left.argmax()) == int(order[step]), step


@pytest.mark.parametrize("rank", [2, 5, 20])
def test_rank_deficient_tokens_follow_by_gate_then_index(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    embeds = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 128, generator=generator)
    features = VisualFeatures(embeds, embeds)
    text = torch.randn(2, 128, generator=generator)
    gate = reference_gate(embeds, text)
    seed = int(embeds.norm(dim=1).argmax())
    order = plan_tokens(features, policy(60), text).order.tolist()
    assert order == reference_order(embeds, gate, seed, 60)
    assert order[rank:] == sorted(order[rank:], key=lambda i: (-float(gate[i]), i))
    without_text = plan_tokens(features, policy(60)).order.tolist()
    assert without_text == reference_order(embeds, torch.ones(60), seed, 60)
    assert without_text[rank:] == sorted(without_text[rank:])


def test_ties_go_to_the_smallest_index() -> None:
    assert plan_tokens(VisualFeatures(torch.eye(6), torch.eye(6)), policy(6)).order.tolist() == [0, 1, 2, 3, 4, 5]
    twice = torch.eye(3).repeat(2, 1)
    assert plan_tokens(VisualFeatures(twice, twice), policy(6)).order.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_zero_seed_token_spans_nothing() -> None:
    embeds = torch.eye(4)
    embeds[2] = 0
    features = VisualFeatures(embeds, embeds, cls_attention=torch.tensor([0.1, 0.1, 0.9, 0.1]))
    assert plan_tokens(features, policy(4)).order.tolist() == [2, 0, 1, 3]


def test_relevance_forms() -> None:
    tokens, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    torch.testing.assert_close(text_relevance(tokens, text, "max"), torch.tensor([1.0, half]))
    torch.testing.assert_close(text_relevance(tokens, text, "mean"), torch.tensor([(1 + half) / 2, half / 2]))
    mean_row = torch.tensor([4.0, 1.0]) / 17**0.5
    torch.testing.assert_close(text_relevance(tokens, text, "mean_token"), mean_row)


def test_seed_tokens() -> None:
    features, text = image(35, 16, grid=(5, 7)), text_of(16)
    embeds, cls = features.embeds, features.cls_attention
    expected = {
        "cls": cls.argmax(),
        "auto": cls.argmax(),
        "norm": embeds.norm(dim=1).argmax(),
        "relevance": text_relevance(normalize(embeds, dim=1), text, "max").argmax(),
        "mean": (normalize(embeds, dim=1) @ embeds.mean(dim=0)).argmax(),
        "center": 2 * 7 + 3,
    }
    for name, index in expected.items():
        assert int(plan_tokens(features, policy(3, seed_token=name), text).order[0]) == int(index), name
    no_cls = VisualFeatures(embeds, embeds)
    assert int(plan_tokens(no_cls, policy(3)).order[0]) == int(expected["norm"])
    assert int(plan_tokens(features, policy(3, seed_token="relevance")).order[0]) == int(expected["norm"])


@pytest.mark.parametrize(("field", "needs"), [("cls", "cls_attention"), ("center", "grid")])
def test_a_seed_token_that_cannot_be_found_is_an_error(field: str, needs: str) -> None:
    features = VisualFeatures(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match=f"pruning.seed_token.*needs {needs}"):
        plan_tokens(features, policy(2, seed_token=field))


def test_rank_by_relevance_is_top_k_of_relevance() -> None:
    features, text = image(50, 16), text_of(16)
    by_relevance = policy(9, rank_by="relevance")
    relevance = text_relevance(normalize(features.embeds, dim=1), text, "max")
    assert plan_tokens(features, by_relevance, text).order.tolist() == relevance.argsort(descending=True)[:9].tolist()
    assert torch.equal(plan_tokens(features, by_relevance).order, plan_tokens(features, policy(9)).order)


def test_alpha_zero_ignores_the_text_and_each_gate_sets_its_default() -> None:
    features, text = image(80, 32), text_of(32)
    plain = plan_tokens(features, policy(40)).order
    assert torch.equal(plan_tokens(features, policy(40, alpha=0), text).order, plain)
    assert torch.equal(plan_tokens(features, policy(40), text[:0]).order, plain)
    for family, clip_alpha in ((LLAVA, 0.75), (QWEN, 0.3)):
        for form, alpha in (("auto", ALPHA), ("minmax", ALPHA), ("clip", clip_alpha)):
            default = plan_tokens(features, policy(40, gate=form), text, family=family).order
            assert torch.equal(default, plan_tokens(features, policy(40, gate=form, alpha=alpha), text).order)
            assert not torch.equal(default, plain)


def test_a_noun_brings_its_tokens_forward() -> None:
    features = image(100, 64)
    wanted = [3, 40, 77]
    kept = plan_tokens(features, policy(10, alpha=4), features.embeds[wanted]).kept.tolist()
    assert set(wanted) <= set(kept)


def test_every_combination_of_options_keeps_k() -> None:
    features, text = image(20, 8, grid=(4, 5)), text_of(8)
    options = product(
        ("max", "mean", "mean_token"),
        ("auto", "cls", "norm", "relevance", "mean", "center"),
        ("residual", "relevance"),
        ("auto", "clip"),
        (None, 0.0, 0.3),
        (None, text),
    )
    for relevance, seed_token, rank_by, gate, alpha, embeds in options:
        chosen = policy(12, relevance=relevance, seed_token=seed_token, rank_by=rank_by, gate=gate, alpha=alpha)
        kept = plan_tokens(features, chosen, embeds).kept.tolist()
        assert len(set(kept)) == 12
        assert kept == sorted(kept)


@pytest.mark.parametrize("shape", [(3,), (2, 7)])
def test_text_of_another_width_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"text_embeds must have shape \(M, 8\)"):
        plan_tokens(image(20, 8), policy(3), torch.ones(shape))
