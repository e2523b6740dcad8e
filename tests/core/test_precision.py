"""The context in which float32 products are float32, and what it leaves behind."""

from collections.abc import Callable

import pytest
import torch

from tests.support.energy import energy_rank
from vllm_vtprune import PruningPolicy, VisualFeatures, plan_tokens
from vllm_vtprune.precision import full_float32
from vllm_vtprune.selectors.random_ import Random

State = tuple[str, str, str]


def state() -> State:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "mixed"
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return overall, *(matmul.fp32_precision for matmul in matmuls)


def older(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SETTINGS: dict[str, Callable[[], None]] = {
    "high": older("high"),
    "medium": older("medium"),
    "highest": older("highest"),
    "newer setting alone": newer,
}


@pytest.fixture(autouse=True)
def _restore() -> object:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=SETTINGS)
def before(request: pytest.FixtureRequest) -> State:
    SETTINGS[request.param]()
    return state()


def test_full_inside_and_as_before_afterwards(before: State) -> None:
    with full_float32():
        assert state() == ("highest", "ieee", "ieee")
        with full_float32():
            pass
        assert state() == ("highest", "ieee", "ieee"), "still inside"
    assert state() == before


def test_whoever_leaves_first_does_not_change_it_for_others(before: State) -> None:
    """As two threads would, of which the second enters before the first leaves."""
    first, second = full_float32(), full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() == ("highest", "ieee", "ieee")
    second.__exit__(None, None, None)
    assert state() == before


def test_an_error_leaves_it_too(before: State) -> None:
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert state() == before


def test_plans_and_ranks_are_computed_inside(before: State, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    select, eigvalsh = Random.select, torch.linalg.eigvalsh

    def watched(*args: object) -> object:
        seen.append(state())
        return select(*args)  # type: ignore[arg-type]

    def watched_eigvalsh(gram: torch.Tensor) -> torch.Tensor:
        seen.append(state())
        return eigvalsh(gram)

    monkeypatch.setattr(Random, "select", watched)
    monkeypatch.setattr(torch.linalg, "eigvalsh", watched_eigvalsh)
    tokens = torch.eye(6)
    policy = PruningPolicy.parse({"method": "random", "budget": {"type": "tokens", "keep": 3}})
    plan_tokens(VisualFeatures(tokens, tokens), policy)
    energy_rank(tokens, 0.9)
    assert seen == [("highest", "ieee", "ieee")] * 2
    assert state() == before
