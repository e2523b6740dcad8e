"""The plan of one image, and the features it is made from."""

import pytest
import torch

from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.features import Tiles
from vllm_vtprune.policy import MethodBudget, PolicyError, RatioBudget
from vllm_vtprune.selectors.method import Method
from vllm_vtprune.selectors.uniform import Uniform


def image(n: int = 36, dtype: torch.dtype = torch.float32) -> VisualFeatures:
    generator = torch.Generator().manual_seed(n)
    encoder = torch.randn(n, 12, generator=generator) * torch.arange(1, 13).pow(-1.5)
    return VisualFeatures(encoder.to(dtype), torch.randn(n, 20, generator=generator).to(dtype))


def test_none_keeps_everything() -> None:
    features = image()
    plan = plan_tokens(features, PruningPolicy.parse(False))
    assert plan.kept.tolist() == plan.order.tolist() == list(range(36))
    assert plan.budget == 36
    assert plan.energy is None
    assert torch.equal(plan.embeds, features.embeds)


def test_a_policy_may_be_a_name_or_fields() -> None:
    features = image()
    for policy in ("fast", {"budget": {"type": "tokens", "keep": 5}}):
        expected = plan_tokens(features, PruningPolicy.parse(policy))
        assert expected.budget < 36
        assert torch.equal(plan_tokens(features, policy).kept, expected.kept)
    with pytest.raises(PolicyError, match=r'^policy: "fats" is not accepted \(did you mean fast\?\)'):
        plan_tokens(features, "fats")


def test_text_that_is_not_used_is_not_looked_at() -> None:
    plan_tokens(image(), PruningPolicy.parse({"method": "uniform"}), torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="text_embeds must be finite"):
        plan_tokens(image(), PruningPolicy.parse({}), torch.full((2, 20), torch.nan))


def test_a_method_may_cap_the_count_or_have_its_own() -> None:
    class Capped(Uniform):
        @classmethod
        def max_keep(cls, features: VisualFeatures) -> int:
            return features.num_tokens // 2

    class Counting(Uniform):
        own_count = True

        def count(self, features: VisualFeatures, text_embeds: torch.Tensor | None) -> int:
            return 5

    def budget(method: Method) -> int:
        return plan_tokens(image(), PruningPolicy.model_construct(root=method)).budget

    assert budget(Capped(budget=RatioBudget(keep=0.9))) == 18
    assert budget(Counting(budget=MethodBudget())) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embeds": torch.zeros(0, 3)}, "embeds must have shape"),
        ({"embeds": torch.tensor(1.0)}, "embeds must have shape"),
        ({"embeds": torch.zeros(4)}, "embeds must have 2"),
        ({"encoder": torch.zeros(3, 2)}, "encoder has 3 tokens, but embeds has 4"),
        ({"encoder": torch.zeros(4, 2, dtype=torch.int64)}, "encoder must be a floating-point tensor"),
        ({"grid": (2, 3)}, r"grid \(2, 3\) does not hold 4 tokens"),
        ({"grid": (-2, -2)}, "grid"),
        ({"cls_attention": torch.zeros(4, 1)}, "cls_attention must have 1"),
        ({"cls_attention": torch.zeros(5)}, "cls_attention has 5"),
        ({"keys": torch.zeros(4, 0)}, "keys must have 2 non-empty"),
        ({"tiles": Tiles(torch.zeros(3, dtype=torch.int64), ((2, 2),))}, "tiles.ids"),
        ({"tiles": Tiles(torch.zeros(4, dtype=torch.int64), ((2, 2),), (None, None))}, "tiles.boxes has 2 entries"),
    ],
)
def test_features_that_contradict_each_other(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualFeatures(**{"encoder": torch.zeros(4, 2), "embeds": torch.zeros(4, 3), **fields})  # type: ignore[arg-type]


def test_features_know_their_size_and_move() -> None:
    shared = torch.zeros(4, 8, dtype=torch.float16)
    features = VisualFeatures(shared, shared, (2, 2), cls_attention=torch.zeros(4))
    assert features.num_tokens == 4
    assert features.nbytes == 4 * 8 * 2 + 4 * 4
    moved = features.to("meta")
    assert moved.encoder is moved.embeds
    assert moved.embeds.device.type == "meta"
    assert moved.cls_attention.device.type == "meta"
    assert moved.grid == (2, 2)
    tiled = VisualFeatures(shared, shared, tiles=Tiles(torch.zeros(4, dtype=torch.int64), ((2, 2),))).to("meta")
    assert tiled.tiles.ids.device.type == "meta"
