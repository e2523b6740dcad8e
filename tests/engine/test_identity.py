"""What tells items apart: vLLM's caches hold them longer than ours, so one hash must always mean the same item.

The processor in this process, without an engine; vLLM's own caches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.cache.base import MultiModalCache
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache

from tests.support.engines import ask_about
from tests.support.images import sample_images
from tests.support.processors import process_prompt, processor_of
from vllm_vtprune.cache import BoundedTable, FeatureCache
from vllm_vtprune.features import PreparedImage, VisualFeatures
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.compat import without_items
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.loads import Load, LoadNotes
from vllm_vtprune.plugin.request import REPORT_KEY, PromptPruning
from vllm_vtprune.plugin.weights import RecordsLoads, WeightsNotInCheckpoint
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint

pytestmark = pytest.mark.usefixtures("placement_api")

BUS = "Where is the bus?"
TOKENS = {"budget": {"type": "tokens", "keep": 48}}
ENERGY = {"budget": {"type": "energy", "threshold": 0.9, "min_tokens": 1}}


@pytest.fixture
def processor(checkpoint: Path) -> Any:
    return processor_of(checkpoint)


def process(
    processor: Any, images: Sequence[Any], pruning: object = TOKENS, cache: Any = None, uuids: Any = None
) -> Any:
    options = {} if pruning is None else {"pruning": pruning}
    return process_prompt(processor, ask_about(BUS, images=len(images)), images, cache=cache, uuids=uuids, **options)


def asked_of(processor: Any, **early: Any) -> PromptPruning:
    """What a server asks of one image."""
    policy = PruningPolicy.parse(TOKENS).resolve(processor.family)
    return PromptPruning(policy, (ImageJob(policy, BUS, **early),))


def embeds_of(result: Any, index: int = 0) -> torch.Tensor:
    """The one field of an item, which holds pixels or what is kept."""
    [field] = result["mm_kwargs"]["image"][index].values()
    return field.data


def counts(result: Any) -> list[int]:
    return [place.get_num_embeds() for place in result["mm_placeholders"]["image"]]


@pytest.fixture
def noisy(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A processor whose encoder never gives the same features twice, far beyond what rounding does."""
    encode = processor.runtime.local.vision_encoder.encode
    noise = torch.Generator().manual_seed(0)

    def encode_otherwise(images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        def other(tensor: torch.Tensor) -> torch.Tensor:
            return tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=noise))

        return [
            replace(features, encoder=other(features.encoder), embeds=other(features.embeds), keys=other(features.keys))
            for features in encode(images)
        ]

    monkeypatch.setattr(processor.runtime.local.vision_encoder, "encode", encode_otherwise)
    monkeypatch.setattr(processor.runtime.local, "cache", FeatureCache(0))
    return processor


@pytest.mark.parametrize(
    "pruning",
    [ENERGY, TOKENS, {"method": "prumerge"}, {**TOKENS, "method": "pool"}, {**ENERGY, "method": "visionzip"}],
    ids=["energy", "tokens", "prumerge", "pool", "visionzip"],
)
def test_one_hash_is_one_count_and_one_choice(noisy: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the encoder's rounding does while features and items are forgotten."""
    chosen: dict[str, tuple[int, ...]] = {}
    plan = noisy.runtime.local.plan
    made = []

    def planned(*arguments: Any) -> Any:
        made.append(plan(*arguments))
        return made[-1]

    monkeypatch.setattr(noisy.runtime.local, "plan", planned)
    [image] = sample_images(1)
    for turn in range(6):
        result = process(noisy, [image], pruning)
        [item_hash] = result["mm_hashes"]["image"]
        kept = tuple(made[-1].kept.tolist())
        assert len(made) == turn + 1
        assert counts(result) == [len(kept)] == [len(embeds_of(result))]
        assert chosen.setdefault(item_hash, kept) == kept
    assert len(chosen) > 1 or pruning.get("method") == "pool", "noise that changes nothing proves nothing"


def test_what_vllm_holds_is_not_made_again_whatever_the_encoder_would_give(noisy: Any) -> None:
    cache = LruKeyReplicatedSenderCache(noisy.info.ctx.model_config)
    [image] = sample_images(1)
    first = process(noisy, [image], ENERGY, cache)
    again = process(noisy, [image], ENERGY, cache)
    assert again["mm_hashes"] == first["mm_hashes"]
    assert counts(again) == counts(first)
    assert again["mm_kwargs"]["image"] == [None]
    [report] = again[REPORT_KEY].images
    assert report == replace(first[REPORT_KEY].images[0], cached=True)


def test_a_plan_that_was_forgotten_is_made_anew_beside_vllm_s_item(noisy: Any) -> None:
    """The item of the first plan is then not taken for that of the second."""
    cache = LruKeyReplicatedSenderCache(noisy.info.ctx.model_config)
    noisy.runtime.planned = BoundedTable(1)
    image_a, image_b = sample_images(2)
    results = [process(noisy, [image], ENERGY, cache) for image in (image_a, image_b, image_a)]
    first, again = results[0], results[2]
    assert first["mm_hashes"] != again["mm_hashes"]
    assert counts(again) == [len(embeds_of(again))] == [again[REPORT_KEY].images[0].kept_tokens]
    assert not again[REPORT_KEY].images[0].cached


# --- vLLM's processor cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [TOKENS, None, {**TOKENS, "images": [None, False, None]}])
def test_a_cache_too_small_for_one_request_costs_time_alone(
    processor: Any, pruning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and API process keep the same items, so that none is taken for sent that was not."""
    too_small = []
    monkeypatch.setattr(compat, "without_items", lambda *arguments: too_small.append(1) or without_items(*arguments))
    config = processor.info.ctx.model_config
    image_a, image_b, image_c = sample_images(3)
    whole = process(processor, [image_a, image_b, image_c], pruning)
    held = sum(MultiModalCache.get_item_size(item) for item in whole["mm_kwargs"]["image"])
    config.multimodal_config.mm_processor_cache_gb = 0.99 * held / 2**30
    sender, receiver = LruKeyReplicatedSenderCache(config), LruKeyReplicatedReceiverCache(config)
    for images in (
        [image_a, image_b, image_c],
        [image_b, image_a, image_c],
        [image_c, image_b, image_a],
        [image_a, image_a, image_b],
        [image_b, image_c, image_a],
    ):
        expected = process(processor, images, pruning)
        result = process(processor, images, pruning, sender)
        assert result["prompt_token_ids"] == expected["prompt_token_ids"]
        assert result["mm_hashes"] == expected["mm_hashes"]
        for index, mm_hash in enumerate(result["mm_hashes"]["image"]):
            item = receiver.get_and_update_item(result["mm_kwargs"]["image"][index], mm_hash)
            torch.testing.assert_close(next(iter(item.values())).data, embeds_of(expected, index))
    assert too_small


# --- clients ----------------------------------------------------------------------------------------------------------


def test_what_clients_of_a_server_put_into_prompts_is_refused(processor: Any) -> None:
    processor.runtime.clients_write_prompts = True
    [image] = sample_images(1)
    for value in (TOKENS, "fast", False, None):
        with pytest.raises(PolicyError, match=r"^mm_processor_kwargs\.pruning: .*request's own pruning field"):
            process(processor, [image], value if value is not None else {})
    assert counts(process(processor, [image], asked_of(processor))) == [48]


# --- weights that change ----------------------------------------------------------------------------------------------


def test_after_a_load_nothing_of_the_old_weights_is_left(tmp_path: Path) -> None:
    old, new = (write_llava_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(2))
    processor = processor_of(old)
    [image] = sample_images(1)
    before = process(processor, [image], uuids=["one"])
    encoding = processor.runtime.encoder.find("one")
    early = asked_of(processor, encoding=encoding, early_key=("one", processor.runtime.generation))

    LoadNotes(str(old)).add(Load(str(new), from_checkpoint=True))
    expected = process(processor_of(new), [image], uuids=["one"])
    afresh, named, on_its_way = (image, TOKENS), (None, TOKENS), (image, early)
    for shown, asked in (afresh, named, on_its_way):
        result = process(processor, [shown], asked, uuids=["one"])
        torch.testing.assert_close(embeds_of(result), embeds_of(expected))
        assert result["mm_hashes"] != before["mm_hashes"]
    assert not torch.allclose(embeds_of(before), embeds_of(result))


def test_weights_that_are_in_no_checkpoint_prune_nothing(tmp_path: Path) -> None:
    checkpoint = write_llava_checkpoint(tmp_path / "model")
    processor = processor_of(checkpoint)
    [image] = sample_images(1)
    process(processor, [image])
    LoadNotes(str(checkpoint)).add(Load(str(checkpoint), from_checkpoint=False))
    for _ in range(2):
        with pytest.raises(WeightsNotInCheckpoint, match="reload_weights"):
            process(processor, [image])
    assert counts(process(processor, [image], False)) == [576]
    LoadNotes(str(checkpoint)).add(Load(str(checkpoint), from_checkpoint=True))
    assert counts(process(processor, [image])) == [48]


class Stock(torch.nn.Module):
    """Takes what it is given."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


class Noting(RecordsLoads, Stock):
    """As the classes that the plugin registers."""


def started(model: str, backend: str = "mp") -> Any:
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=model), parallel_config=SimpleNamespace(distributed_executor_backend=backend)
    )
    noting = Noting(vllm_config=config)
    assert noting.load_weights([("a", None)]) == {"a"}
    return noting.eval()


def test_a_worker_notes_the_loads_after_its_start() -> None:
    def get_all_weights() -> Iterator[tuple[str, None]]:
        yield "b", None

    notes = LoadNotes("a model")
    model = started("a model")
    assert notes.latest() is None
    model._model_config.model = "another"
    assert model.load_weights(get_all_weights()) == {"b"}
    assert notes.latest() == Load("another", from_checkpoint=True)
    assert notes.latest() is None
    model.load_weights([("b", None)])
    assert notes.latest() == Load("another", from_checkpoint=False)
    assert LoadNotes("a model").latest() is None, "made before"
    assert LoadNotes("another model").latest() is None


def test_a_worker_that_nobody_would_hear_loads_nothing() -> None:
    with pytest.raises(RuntimeError, match="engine on Ray"):
        started("on Ray", backend="ray").load_weights([])
