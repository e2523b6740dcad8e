"""What a producer tells a consumer of an image: the plan as JSON, and what is refused."""

import json
from typing import Any

import pytest
import torch

from vllm_vtprune.features import Tiles, VisualFeatures
from vllm_vtprune.kept import KeptTokens, indices_of
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.report import ImageReport
from vllm_vtprune.sent_plan import SentPlan

KEPT = torch.tensor([0, 1, 4, 7])
ROWS = torch.rand(8, 4)
TILES = Tiles(torch.tensor([0] * 4 + [1] * 4), ((2, 2), (2, 2)), (None, (0.0, 0.0, 1.0, 1 / 3)))


@pytest.mark.parametrize(
    "features",
    [VisualFeatures(ROWS, ROWS, grid=(2, 4)), VisualFeatures(ROWS, ROWS, tiles=TILES)],
    ids=["grid", "tiles"],
)
def test_a_plan_arrives_as_it_was_sent(features: VisualFeatures) -> None:
    kept = KeptTokens.of(features, KEPT, view=(0.0, 1 / 7, 1.0, 6 / 7))
    report = ImageReport("resprune", 8, 4, energy=0.9876543210123, kept=kept, allotted_tokens=5, placement_reason="why")
    plan = SentPlan.of(report)
    arrived = SentPlan.read(json.loads(json.dumps(plan.to_json())), "plan")
    assert arrived == plan
    assert arrived.kept == kept
    assert (arrived.energy, arrived.allotted_tokens, arrived.placement_reason) == (0.9876543210123, 5, "why")
    assert torch.equal(indices_of(arrived.kept.runs), KEPT)


def test_an_image_without_positions_has_no_plan() -> None:
    assert SentPlan.of(ImageReport("resprune", 8, 4)) is None


WRITTEN: dict[str, Any] = {
    "visual_tokens": 8,
    "kept_tokens": 4,
    "kept": {"grid": None, "runs": [[0, 2], [4, 1]], "tiles": [], "view": None},
}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"runs": []}, "plan.kept.runs"),
        ({"runs": [[4, 1], [0, 2]]}, "plan.kept.runs"),
        ({"runs": [[0, 2], [1, 2]]}, "plan.kept.runs"),
        ({"runs": [[0, 2], [2, 2]]}, "plan.kept.runs"),
        ({"runs": [[-1, 2]]}, "plan.kept.runs"),
        ({"runs": [[0, 0]]}, "plan.kept.runs"),
        ({"runs": [[0, 1.5]]}, "plan.kept.runs.0.1"),
        ({"runs": "all"}, "plan.kept.runs"),
        ({"grid": [2]}, "plan.kept.grid.1"),
    ],
    ids=str,
)
def test_positions_that_are_none_are_refused(change: dict[str, Any], param: str) -> None:
    SentPlan.read(WRITTEN, "plan")
    with pytest.raises(PolicyError) as error:
        SentPlan.read({**WRITTEN, "kept": {**WRITTEN["kept"], **change}}, "plan")
    assert error.value.param == param
    assert str(error.value).startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (True, "plan"),
        ({}, "plan.visual_tokens"),
        ({**WRITTEN, "kept_tokens": 0}, "plan.kept_tokens"),
        ({**WRITTEN, "energy": float("inf")}, "plan.energy"),
    ],
    ids=str,
)
def test_what_is_no_plan_is_refused(value: object, param: str) -> None:
    with pytest.raises(PolicyError) as error:
        SentPlan.read(value, "plan")
    assert error.value.param == param
