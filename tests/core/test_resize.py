"""`resize` as a policy: the budgets and the families that it goes with, and the area that a budget leads to."""

import pytest
import torch

from tests.support.defaults import QWEN, TILED
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.policy import LLAVA, FamilyDefaults, PolicyError
from vllm_vtprune.selectors import METHODS, SELECTORS
from vllm_vtprune.selectors.resize import largest_area

TOKENS = {"type": "tokens", "keep": 9}


def resize(**fields: object) -> PruningPolicy:
    return PruningPolicy.parse({"method": "resize", "budget": TOKENS, **fields})


@pytest.mark.parametrize("budget", [None, {"threshold": 0.9}, {"type": "energy"}, {"type": "method"}])
def test_budgets_that_need_features_are_refused(budget: object) -> None:
    fields = {"method": "resize"} if budget is None else {"method": "resize", "budget": budget}
    with pytest.raises(PolicyError, match="needs features, but method resize runs before encoding") as raised:
        PruningPolicy.parse(fields)
    kind = "method" if budget == {"type": "method"} else "energy"
    assert (raised.value.param, raised.value.value) == ("pruning.budget.type", kind)
    assert raised.value.accepted == '"tokens" or "ratio"'


def test_it_reads_nothing_but_its_budget() -> None:
    policy = resize()
    assert policy.dump() == {"method": "resize", "budget": TOKENS}
    assert PruningPolicy.parse(policy.dump()) == policy
    assert policy.enabled
    assert not policy.selects
    assert not policy.conditions_on_text
    for field, value in (("seed", 1), ("alpha", 0.5), ("text", {"query": "bus"})):
        with pytest.raises(PolicyError, match=f"method resize does not use {field}"):
            resize(**{field: value})


@pytest.mark.parametrize("family", [LLAVA, TILED])
def test_models_of_a_fixed_resolution_refuse_it(family: FamilyDefaults) -> None:
    with pytest.raises(PolicyError) as raised:
        resize().resolve(family)
    problem = "pruning.method: method resize needs dynamic_resolution, which this model does not have; expected one of "
    assert str(raised.value).startswith(problem + "none, resprune, ")
    assert "resize" not in raised.value.accepted


def test_qwen_takes_it() -> None:
    assert resize().resolve(QWEN) == resize()
    with pytest.raises(PolicyError) as raised:
        PruningPolicy.parse({"method": "tome"}).resolve(QWEN)
    assert "resize" in raised.value.accepted.split(", ")


def test_it_is_a_method_but_chooses_no_tokens() -> None:
    assert set(METHODS) - set(SELECTORS) == {"resize"}
    features = VisualFeatures(torch.randn(16, 4), torch.randn(16, 4), (4, 4))
    with pytest.raises(PolicyError, match="method resize resizes the image before encoding") as raised:
        plan_tokens(features, resize(), family=QWEN)
    assert raised.value.param == "pruning.method"
    assert raised.value.accepted == "one of " + ", ".join(SELECTORS)


@pytest.mark.parametrize("k", [1, 2, 100, 10**6])
def test_the_area_is_the_largest_that_will_do(k: int) -> None:
    assert largest_area(lambda area: max(1, area // 784), k) == (k + 1) * 784 - 1


def test_counts_between_two_grids_lead_to_one_area() -> None:
    """So that budgets which come to the same picture share it in every cache."""
    areas = {largest_area(lambda area: max(1, int((area / 784) ** 0.5)) ** 2, k) for k in range(100, 121)}
    assert len(areas) == 1
