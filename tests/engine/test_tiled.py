"""Families with tiles, beside what `test_families.py` asks of every family.

Prefill goes in chunks smaller than an image, and every cache is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine.mixtures import ASKED, TOKENS, ask_about_a_video, ask_in_every_order, picture
from tests.engine.test_families import Checker, Shown, ratio
from tests.support.engines import MODEL_RUNNERS, Ask, reports, running_engine
from tests.support.families import FAMILIES, Chat, Family
from tests.support.unpruned import UnprunedReference
from tests.support.videos import VideoReference
from vllm_vtprune.plugin.image import feature_key
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint

pytestmark = pytest.mark.engine

INTERNVL = pytest.param("internvl", marks=pytest.mark.verify)


@pytest.fixture(scope="module", params=["llava_next", INTERNVL])
def family(request: pytest.FixtureRequest) -> Family:
    media = {"image": 4, "video": 1} if request.param == "internvl" else {"image": 4}
    return replace(FAMILIES[request.param], options={"limit_mm_per_prompt": media})


@pytest.fixture(scope="module")
def checker(family: Family, model_runner: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checker]:
    checkpoint = family.write(tmp_path_factory.mktemp(family.name))
    name, environment = f"{family.name}-tiles", MODEL_RUNNERS[model_runner]
    with running_engine(checkpoint, name, environment=environment, **family.engine_options) as engine:
        yield Checker(family, engine, VideoReference(checkpoint), Chat(checkpoint))


def test_pruned_unpruned_and_cached_images_in_every_order(checker: Checker) -> None:
    ask_in_every_order(checker)


@pytest.mark.parametrize(
    "policy",
    [
        ratio(0.1, method="adaptprune"),
        ratio(0.2, method="hired"),
        {"budget": {"type": "energy", "threshold": 0.99, "min_tokens": 1}},
        {"method": "uniform", "budget": {"type": "tokens", "keep": 1}},
        ratio(1.0, method="last"),
    ],
    ids=lambda policy: f"{policy.get('method', 'resprune')}-{'-'.join(map(str, policy['budget'].values()))}",
)
def test_methods_and_budgets_over_shapes(policy: Any, checker: Checker) -> None:
    for number, aspect in enumerate(((1, 1), (3, 1), (1, 40), (300, 1))):
        checker.ask(ASKED, [Shown(f"methods-{aspect}", picture(number, aspect), policy)])


@pytest.mark.parametrize("family", [INTERNVL], indirect=True, scope="module")
def test_a_client_may_ask_for_fewer_tiles(checker: Checker) -> None:
    shown, engine = picture(1, (2, 1), "tiles"), checker.engine
    few: dict[str, Any] = {"max_patches": 4}
    for kwargs, rows, columns in (({}, 2, 4), (few, 1, 2), ({"images_kwargs": few}, 1, 2)):
        answer = engine.ask(Ask(checker.chat.prompt(ASKED), [shown], TOKENS, processor_kwargs=kwargs))
        tiles = rows * columns + 1
        assert [(report.visual_tokens, report.kept_tokens) for report in reports(answer)] == [(tiles * 16, 24)]
        key = feature_key(engine.processor, PruningPolicy.parse(TOKENS), shown, hf_kwargs=kwargs)
        features = engine.runtime.local.cache.get(key)
        tops = {box[0] for box in features.tiles.boxes if box is not None}
        assert (len(tops), features.tiles.overview) == (rows, tiles - 1)


@pytest.mark.parametrize("family", [INTERNVL], indirect=True, scope="module")
def test_videos_pass_unpruned_in_either_order(checker: Checker) -> None:
    ask_about_a_video(checker, "<video>")


@pytest.mark.verify
@pytest.mark.parametrize(
    ("write", "tokens", "newlines"),
    [
        (partial(write_llava_next_checkpoint, image_size=336), 2880, 48),
        (partial(write_internvl_checkpoint, image_size=448), 2560, 0),
    ],
    ids=["llava_next", "internvl"],
)
def test_tiles_of_the_released_size(
    write: Callable[[Path], Path],
    tokens: int,
    newlines: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The papers' 640 and 320 tokens of LLaVA-NeXT's 2,880, chosen by each paper's method."""
    checkpoint = write(tmp_path)
    large = Family("large", write, cls=True, options={"max_num_batched_tokens": 1024, "max_model_len": 8192})
    with running_engine(checkpoint, "large", **large.engine_options) as engine:
        checker = Checker(large, engine, UnprunedReference(checkpoint), Chat(checkpoint))
        image = picture(0, (1, 1)).resize((1000, 1000))
        for method, keep in (("resprune", 640), ("resprune", 320), ("adaptprune", 640), ("adaptprune", 320)):
            policy = {"method": method, "budget": {"type": "tokens", "keep": keep}}
            [report] = reports(checker.ask(ASKED, [Shown("large", image, policy)]))
            assert (report.kept_tokens, report.visual_tokens) == (keep + newlines, tokens + newlines)
        record_property("worst_logprob_difference", checker.worst)
