"""What a producer of encoder disaggregation sends a consumer about an image whose tokens it selected before scheduling.

A consumer that knows the kept tokens makes the producer's hash, sizes the image's placeholder and positions its tokens
without the features. Plans travel as JSON, beside a request.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.report import ImageReport

PLANS = "pruning_plans"
"""Field of a request: ``true`` asks a producer for its plans; a list brings a consumer the plan or null of each image.
Also the field of the producer's answer."""
ACCEPTED = "a plan as a producer sends it"

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class SentPlan:
    """The plan of one image; attributes as of `ImageReport`.

    Attributes:
        kept: indices of the kept tokens, and where they lie.
    """

    visual_tokens: Count
    kept_tokens: Count
    kept: KeptTokens
    energy: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    allotted_tokens: Count | None = None
    placement_reason: str | None = None

    @classmethod
    def of(cls, report: ImageReport) -> SentPlan | None:
        """The plan in the report of an image; None if no positions were reported."""
        return (
            None if report.kept is None else cls(**{field.name: getattr(report, field.name) for field in fields(cls)})
        )

    @classmethod
    def read(cls, value: object, param: str) -> SentPlan:
        """A plan from JSON; the inverse of `to_json`.

        Args:
            value: the JSON value.
            param: the field's path in errors.

        Raises:
            PolicyError: it is no plan, or no ascending positions.
        """
        try:
            plan = _ADAPTER.validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            path = ".".join(map(str, (param, *problem["loc"])))
            raise PolicyError(path, problem["input"], f"{ACCEPTED} ({problem['msg'].lower()})") from None
        runs = plan.kept.runs
        ends = [-1, *(start + length for start, length in runs)]
        ascend = all(start > end and length > 0 for (start, length), end in zip(runs, ends, strict=False))
        if not runs or not ascend:
            raise PolicyError(f"{param}.kept.runs", runs, "ascending runs with other tokens between them")
        return plan

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


_ADAPTER = TypeAdapter(SentPlan)
