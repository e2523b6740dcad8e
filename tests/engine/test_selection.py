"""Selection in the engine, without one: what is placed there, what travels with an image, what a worker does."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import ECTransferConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalSharedField,
)
from vllm.multimodal.utils import group_and_batch_mm_items

from tests.support.engines import join_world
from vllm_vtprune import plan_tokens
from vllm_vtprune.features import EMBED, Layout, Tiles, VisualFeatures
from vllm_vtprune.plugin.families.llava import WITH_CLIP
from vllm_vtprune.plugin.families.llava_next import anyres
from vllm_vtprune.plugin.in_engine import KEPT, TokenSelector
from vllm_vtprune.plugin.placement import EnginePlacement, refuse_placement
from vllm_vtprune.plugin.selection import SELECTION, Selection, split
from vllm_vtprune.policy import PolicyError, PruningPolicy

TOKENS = {"type": "tokens", "keep": 5}
RATIO = {"type": "ratio", "keep": 0.5}
ENERGY = {"type": "energy", "threshold": 0.9}
METHOD = {"type": "method"}
NO_POSITIONS = "M-RoPE needs Model Runner V2"
WIDTH, VOCABULARY = 12, 40


def policy(**fields: Any) -> PruningPolicy:
    return PruningPolicy.parse(fields).resolve(WITH_CLIP)


BLIND = {"method": "resprune", "seed_token": "norm", "alpha": 0}


@pytest.mark.parametrize("budget", [TOKENS, RATIO])
@pytest.mark.parametrize("choice", ["auto", "engine"])
def test_counted_budgets_go_to_the_engine(budget: dict[str, Any], choice: Any) -> None:
    assert EnginePlacement(choice).place(policy(budget=budget), WITH_CLIP) == ("engine", None)
    assert EnginePlacement("api").place(policy(budget=budget), WITH_CLIP) == ("api", None)


@pytest.mark.parametrize(
    ("fields", "obstacles", "of_family", "field", "reason"),
    [
        ({"budget": ENERGY}, {}, {}, "budget.type", 'budget "energy" needs features'),
        ({"method": "prumerge", "budget": METHOD}, {}, {}, "budget.type", 'budget "method" needs features'),
        ({"budget": TOKENS}, {"no_positions": NO_POSITIONS}, {}, "method", NO_POSITIONS),
        (
            {"budget": TOKENS},
            {},
            {"fixed_length": False},
            "method",
            "this model's prompt depends on which tokens are kept",
        ),
        (
            {"method": "vispruner", "budget": TOKENS},
            {"no_hooks": "the encoder is compiled"},
            {},
            "method",
            "method vispruner reads cls_attention, encoder, and the encoder is compiled",
        ),
    ],
)
def test_what_the_engine_cannot_follow(
    fields: dict[str, Any], obstacles: dict[str, Any], of_family: dict[str, Any], field: str, reason: str
) -> None:
    """The API process does, and says why; it refuses, where the operator wants the engine alone."""
    engine, family = EnginePlacement("auto", **obstacles), replace(WITH_CLIP, **of_family)
    placement, why = engine.place(policy(**fields), family)
    assert placement == "api"
    assert why.startswith(reason)
    with pytest.raises(PolicyError, match="selects in its engine only") as refused:
        replace(engine, choice="engine").place(policy(**fields), family, param="messages.0.content.1.pruning")
    assert refused.value.param == f"messages.0.content.1.pruning.{field}"
    assert reason in str(refused.value)


def test_what_hooks_would_not_see_matters_to_those_that_read_it() -> None:
    engine = EnginePlacement("auto", no_hooks="the encoder is compiled")
    assert engine.place(policy(**BLIND, budget=TOKENS), WITH_CLIP) == ("engine", None)


def test_unknown_engines_place_no_tokens_of_mrope_models_unasked() -> None:
    """An `LLM` does not tell its processor which model runner it has; workers refuse to start with the wrong one."""
    unknown = EnginePlacement("auto", no_positions=None)
    assert unknown.place(policy(budget=TOKENS), WITH_CLIP)[0] == "api"
    assert replace(unknown, choice="engine").place(policy(budget=TOKENS), WITH_CLIP)[0] == "engine"


LAYOUTS = {
    "grid": Layout(16, grid=(2, 2), connector_rows=torch.tensor([2, 0, 3, 1])),
    "prompt": Layout(8, prompt=(7, EMBED, EMBED, 9)),
    "tiles": Layout(
        patches=8,
        tiles=Tiles(ids=torch.tensor([0, 0, 1]), grids=((1, 2), (1, 1)), boxes=((0.0, 0.0, 0.5, 1.0), None)),
    ),
    "anyres": anyres((300, 200), pinpoints=((112, 224), (224, 112)), image_size=112, side=8),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_selection_travels_with_its_item(layout: Layout) -> None:
    fields = MultiModalKwargsItem({"pixels": MultiModalFieldElem(torch.ones(3), MultiModalBatchedField())})
    chosen = Selection("key", policy(method="divprune", budget=RATIO), 3, (1, 2), layout)
    item = chosen.attach(fields)
    assert item[SELECTION].field.keep_on_cpu
    assert set(item) == {"pixels", SELECTION}
    arrived = Selection.read(item[SELECTION].data)
    assert (arrived.key, arrived.policy, arrived.keep) == (chosen.key, chosen.policy, chosen.keep)
    assert tuple(arrived.noun_ids) == chosen.noun_ids
    assert arrived.layout.num_tokens == layout.num_tokens
    assert arrived.length == 3 + layout.newlines
    assert arrived.layout.grids == layout.grids
    assert json.dumps(arrived.layout.dump()) == json.dumps(layout.dump())


def item(index: int, rows: int) -> tuple[MultiModalKwargsItem, Selection]:
    fields = {
        "flat": MultiModalFieldElem(torch.full((rows, 2), index), MultiModalFlatField(slices=[slice(0, rows)])),
        "batched": MultiModalFieldElem(torch.tensor([index]), MultiModalBatchedField()),
        "ragged": MultiModalFieldElem(torch.full((index + 1,), index), MultiModalBatchedField()),
        "shared": MultiModalFieldElem(torch.tensor(9), MultiModalSharedField(batch_size=1)),
    }
    chosen = Selection(str(index), policy(budget=TOKENS), 1, (), Layout(rows, grid=(1, rows)))
    whole = chosen.attach(MultiModalKwargsItem(fields))
    return whole, Selection.read(whole[SELECTION].data)


@pytest.mark.parametrize("parts", [[range(3)], [range(1), range(1, 3)], [range(1), range(1, 2), range(2, 3)]])
def test_a_batch_is_split_as_vllm_joined_it(parts: list[range]) -> None:
    items = [item(index, rows) for index, rows in enumerate((2, 1, 3))]
    [(_, joined)] = group_and_batch_mm_items([whole for whole, _ in items])
    joined.pop(SELECTION)
    for part, fields in zip(parts, split(joined, [selection for _, selection in items], parts), strict=True):
        [(_, expected)] = group_and_batch_mm_items([items[index][0] for index in part])
        expected.pop(SELECTION)
        assert fields.keys() == expected.keys()
        for name, value in fields.items():
            assert len(value) == len(expected[name]) if name != "shared" else torch.equal(value, expected[name])
            if name != "shared":
                assert all(map(torch.equal, value, expected[name]))


class Vision(nn.Module):
    """A model whose encoder turns pixels into embeddings, and that has words."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = ParallelLMHead(VOCABULARY, WIDTH)
        self.words = VocabParallelEmbedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.words.weight)
        self.multi_modal_projector = nn.Linear(WIDTH, WIDTH)
        self.encoded: list[int] = []

    def embed(self, pixels: Tensor) -> Tensor:
        self.encoded.append(len(pixels))
        return pixels


@pytest.fixture(scope="module")
def model() -> Vision:
    join_world()
    with set_current_vllm_config(VllmConfig()):
        torch.manual_seed(0)
        return Vision()


@pytest.fixture
def selector(model: Vision) -> TokenSelector:
    hf = SimpleNamespace()
    config: Any = SimpleNamespace(hf_config=hf, hf_text_config=SimpleNamespace(hidden_size=WIDTH))
    model.encoded.clear()
    return TokenSelector(model, replace(WITH_CLIP, attention=None), config)


def selection(key: str = "key", keep: int = 4, nouns: tuple[int, ...] = (3, 5), **fields: Any) -> Selection:
    chosen = policy(**{"seed_token": "norm", **fields, "budget": {"type": "tokens", "keep": keep}})
    return Selection(key, chosen, keep, nouns, Layout(16, grid=(4, 4)))


def test_a_worker_keeps_what_a_plan_keeps(model: Vision, selector: TokenSelector) -> None:
    pixels = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1))
    chosen = [selection("a"), selection("b", keep=6, nouns=())]
    pruned = selector.prune(model.embed, {"pixels": pixels}, chosen)
    for rows, image, each in zip(pruned, pixels, chosen, strict=True):
        features = VisualFeatures(image, image, grid=(4, 4))
        text = model.words(torch.tensor(each.noun_ids)) if each.noun_ids else None
        plan = plan_tokens(features, each.policy, text, family=WITH_CLIP)
        assert torch.equal(rows, plan.embeds)
        assert getattr(rows, KEPT).tolist() == plan.kept.tolist()


def test_an_image_that_is_encoded_again_keeps_its_tokens(model: Vision, selector: TokenSelector) -> None:
    """Though rounding differs in another batch: other tokens would not fit the blocks of the prefix cache."""
    generator = torch.Generator().manual_seed(2)
    first, other = torch.randn(2, 1, 16, WIDTH, generator=generator)
    [once] = selector.prune(model.embed, {"pixels": first}, [selection()])
    [again] = selector.prune(model.embed, {"pixels": other}, [selection()])
    assert getattr(again, KEPT).tolist() == getattr(once, KEPT).tolist()
    assert torch.equal(again, other[0][getattr(again, KEPT)])
    [fresh] = selector.prune(model.embed, {"pixels": other}, [selection("another key")])
    assert getattr(fresh, KEPT).tolist() != getattr(once, KEPT).tolist()


def test_a_selector_that_is_dropped_takes_its_hooks_off_the_model(model: Vision, selector: TokenSelector) -> None:
    hooks = model.multi_modal_projector._forward_pre_hooks
    before = len(hooks)
    selector.close()
    assert len(hooks) == before - 1


def test_batches_of_the_encoder_are_bounded_by_all_tokens(
    model: Vision, selector: TokenSelector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM bounds them by the tokens that are kept."""
    monkeypatch.setattr("vllm_vtprune.plugin.reading.BATCH_PATCHES", 32)
    pixels = torch.randn(5, 16, WIDTH)
    assert len(selector.prune(model.embed, {"pixels": pixels}, [selection(str(i), keep=1) for i in range(5)])) == 5
    assert model.encoded == [2, 2, 1]


def test_a_selection_that_fails_keeps_tokens_at_equal_distances_and_is_logged(
    model: Vision, selector: TokenSelector, caplog: pytest.LogCaptureFixture
) -> None:
    """An error would end the engine, and with it the requests of others."""
    pixels = torch.full((1, 16, WIDTH), torch.nan)
    logger = logging.getLogger("vllm.vtprune")
    logger.addHandler(caplog.handler)
    [rows] = selector.prune(model.embed, {"pixels": pixels}, [selection()])
    logger.removeHandler(caplog.handler)
    assert getattr(rows, KEPT).tolist() == [0, 4, 8, 12]
    assert "embeds must be finite" in caplog.text


@pytest.mark.parametrize(
    ("facts", "obstacle"),
    [
        ({}, ""),
        ({"use_v2_model_runner": False}, "the engine has V1"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline parallelism"),
        ({"ec_transfer_config": ECTransferConfig(ec_connector="any", ec_role="ec_producer")}, "connector"),
    ],
)
def test_workers_refuse_a_placement_that_they_cannot_follow(
    facts: dict[str, Any], obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = {
        "use_v2_model_runner": True,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "ec_transfer_config": None,
        "is_mm_encoder_only": False,
        "compilation_config": SimpleNamespace(compile_mm_encoder=False),
    }
    multimodal = SimpleNamespace(mm_encoder_tp_mode="weights")
    model: Any = SimpleNamespace(uses_mrope=True, get_multimodal_config=lambda: multimodal)
    engine: Any = SimpleNamespace(model_config=model, **{**able, **facts})
    refuse_placement(engine)
    reason = EnginePlacement.of("auto", model, engine).no_positions
    assert obstacle in (reason or "") if obstacle else reason == ""
    monkeypatch.setenv("VTPRUNE_PLACEMENT", "engine")
    outcome = pytest.raises(ValueError, match=f"VTPRUNE_PLACEMENT=engine: .*{obstacle}.*expected auto or api")
    with outcome if obstacle else nullcontext():
        refuse_placement(engine)
