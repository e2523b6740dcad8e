"""`features`: the spaces that ResPrune and DivPrune compare tokens in."""

from dataclasses import replace

import pytest
import torch

from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.plugin.family import Family
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.selectors.divprune import DivPrune

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = VisualFeatures(
    torch.randn(60, 40, generator=GENERATOR),
    torch.randn(60, 50, generator=GENERATOR) + 2,
    cls_attention=torch.rand(60, generator=GENERATOR),
)
TEXT = torch.randn(3, 50, generator=GENERATOR)
METHODS = pytest.mark.parametrize("method", ["resprune", "divprune"])


def order(image: VisualFeatures, text: torch.Tensor | None = None, **fields: object) -> list[int]:
    policy = PruningPolicy.parse({"budget": {"type": "tokens", "keep": 30}, **fields})
    return plan_tokens(image, policy, text).order.tolist()


@METHODS
@pytest.mark.parametrize("seed_token", ["cls", "norm", "mean"])
def test_encoder_is_the_method_on_what_feeds_the_connector(method: str, seed_token: str) -> None:
    fields = {"method": method, **({"seed_token": seed_token} if method == "resprune" else {})}
    picks = order(IMAGE, features="encoder", **fields)
    assert picks == order(replace(IMAGE, embeds=IMAGE.encoder), **fields)
    assert picks != order(IMAGE, **fields)


@METHODS
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e20])
def test_both_count_alike_whatever_their_scale(method: str, scale: float) -> None:
    picks = order(IMAGE, features="both", method=method)
    assert picks == order(replace(IMAGE, encoder=scale * IMAGE.encoder), features="both", method=method)
    assert picks not in (order(IMAGE, features=features, method=method) for features in ("projected", "encoder"))
    parts = [rows / rows.square().sum(dim=1).mean().sqrt() for rows in (IMAGE.embeds, IMAGE.encoder)]
    assert picks == order(replace(IMAGE, embeds=torch.cat(parts, dim=1)), method=method)
    assert order(replace(IMAGE, encoder=IMAGE.embeds), features="both", method=method) == order(IMAGE, method=method)


@METHODS
@pytest.mark.parametrize("name", ["encoder", "embeds"])
def test_a_space_of_zeros_leaves_the_other(method: str, name: str) -> None:
    other = "projected" if name == "encoder" else "encoder"
    features = replace(IMAGE, **{name: torch.zeros_like(getattr(IMAGE, name))})
    assert order(features, features="both", method=method) == order(IMAGE, features=other, method=method)


@pytest.mark.parametrize("features", ["encoder", "both"])
def test_likeness_to_the_text_is_that_of_the_embeddings(features: str) -> None:
    [first, *rest] = order(IMAGE, TEXT, features=features, seed_token="relevance")
    assert first == order(IMAGE, TEXT, seed_token="relevance")[0]
    assert [first, *rest] != order(IMAGE, None, features=features, seed_token="relevance")
    by_text = {"rank_by": "relevance"}
    assert order(IMAGE, TEXT, features=features, **by_text) == order(IMAGE, TEXT, **by_text)


def test_both_are_side_by_side_in_float32() -> None:
    halves = replace(IMAGE, encoder=IMAGE.encoder.bfloat16(), embeds=IMAGE.embeds.half())
    joint = DivPrune(features="both").compared_rows(halves)
    assert (joint.shape, joint.dtype) == ((60, 90), torch.float32)
    for part in joint.split([50, 40], dim=1):
        torch.testing.assert_close(part.square().sum(dim=1).mean(), torch.tensor(1.0))


def test_a_plan_of_a_family_without_a_known_connector_is_refused() -> None:
    generic = Family(0.5, frozenset(), name="generic", connector="")
    with pytest.raises(PolicyError, match=r'pruning.features: "both" needs encoder.*expected "projected"'):
        plan_tokens(IMAGE, PruningPolicy(features="both"), family=generic)
