"""`resize` on Qwen2.5-VL: what enters the engine is a stock image of the smaller picture, under a hash of its own.

The first half asks the multimodal processor alone; the second half, the engine of `test_qwen.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from vllm.multimodal.media import MediaWithBytes

from tests.engine.mixtures import TOKENS, ask_about_a_video
from tests.engine.test_families import QUESTION, Checker, Shown
from tests.support.engines import BLOCK, Answer, Ask, Engine, assert_same, reports, uncached
from tests.support.families import FAMILIES, Chat, Turn
from tests.support.images import sample_images
from tests.support.processors import process_prompt, processor_of
from tests.support.videos import VideoReference
from vllm_vtprune import PruningPolicy
from vllm_vtprune.plugin.early import EarlyEncoding
from vllm_vtprune.plugin.families.qwen2_5_vl import PrunedQwen2_5_VLProcessor
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.inspection import pruning_processor
from vllm_vtprune.plugin.request import REPORT_KEY
from vllm_vtprune.policy import PolicyError
from vllm_vtprune.report import ImageReport
from vllm_vtprune_checkpoints import tiny_checkpoint

pytestmark = pytest.mark.engine

UNIT = 28  # pixels to a side of a token
SIZES = (
    (500, 400),
    (224, 224),
    (200, 800),
    (1500, 1100),
    (40, 30),
    (2000, 21),
)  # within the limits, beyond, below; thin
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"max_pixels": 100_000},
    {"min_pixels": 300_000},
    {"min_pixels": 200_000, "max_pixels": 400_000},
    {"size": {"shortest_edge": 150_000, "longest_edge": 300_000}},
    {"images_kwargs": {"min_pixels": 400_000}},
    {"images_kwargs": {"size": {"shortest_edge": 1_000, "longest_edge": 60_000}}},
    {"do_resize": False},
)


def resize(keep: float) -> dict[str, Any]:
    kind = "tokens" if isinstance(keep, int) else "ratio"
    return {"method": "resize", "budget": {"type": kind, "keep": keep}}


def grid_at(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Rows and columns of a picture (width, height) whose only size is `area`."""
    width, height = size
    rows, columns = smart_resize(height, width, UNIT, area, area)
    return rows // UNIT, columns // UNIT


def best_grid(size: tuple[int, int], k: int) -> tuple[tuple[int, int], int]:
    """Of those with at most `k` tokens, the grid with the most, and the smallest area found that leads to it."""
    step = max(1, k * UNIT**2 // 4000)
    areas = {grid_at(size, area): area for area in range(4 * k * UNIT**2, 0, -step)}
    grid = max((grid for grid in areas if grid[0] * grid[1] <= k), key=lambda grid: grid[0] * grid[1])
    return grid, areas[grid]


# --- the processor ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(qwen_checkpoint: Path) -> PrunedQwen2_5_VLProcessor:
    processor = processor_of(qwen_checkpoint)
    assert isinstance(processor, PrunedQwen2_5_VLProcessor)
    return processor


def process(
    processor: PrunedQwen2_5_VLProcessor,
    images: Sequence[Image.Image | None],
    pruning: Mapping[str, Any] | None = None,
    uuids: Sequence[str | None] | None = None,
    **kwargs: Any,
) -> Any:
    if pruning is not None:
        kwargs["pruning"] = pruning
    return process_prompt(processor, "<|image_pad|>" * len(images), images, uuids=uuids, **kwargs)


def report_of(result: Any) -> list[ImageReport]:
    report = result[REPORT_KEY]
    assert report.timings == {}
    return report.images


def grid_of(result: Any, index: int = 0) -> tuple[int, int]:
    frames, rows, columns = result["mm_kwargs"]["image"][index]["image_grid_thw"].data.tolist()
    assert frames == 1
    return rows // 2, columns // 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_budget_leads_to_the_largest_grid_within_it(
    size: tuple[int, int], processor: PrunedQwen2_5_VLProcessor
) -> None:
    image = Image.effect_noise(size, 60).convert("RGB")
    encoded_before = len(processor.runtime.local.cache)
    rows, columns = grid_of(process(processor, [image]))
    whole = rows * columns
    for k in sorted({1, 2, 3, whole // 5, whole // 2, whole - 1, whole, whole + 1} - {0}):
        result = process(processor, [image], resize(k))
        [report] = report_of(result)
        kept = result["mm_placeholders"]["image"][0].get_num_embeds()
        rows, columns = grid_of(result)
        assert kept == rows * columns <= k
        expected = ImageReport("resize", whole, kept, bypass_reason="budget_not_below_tokens" if k >= whole else None)
        assert report == expected
        rows, columns = best_grid(size, k)[0]
        assert kept >= min(rows * columns, whole)
    assert len(processor.runtime.local.cache) == encoded_before


@pytest.mark.parametrize(("keep", "k"), [(0.5, 126), (0.25, 63), (1 / 3, 84), (1e-6, 1), (1.0, 252)])
def test_a_ratio_is_of_the_tokens_that_stock_would_have(
    keep: float, k: int, processor: PrunedQwen2_5_VLProcessor
) -> None:
    image = Image.effect_noise((500, 400), 60).convert("RGB")
    by_ratio, by_count = process(processor, [image], resize(keep)), process(processor, [image], resize(k))
    assert by_ratio["mm_hashes"] == by_count["mm_hashes"]
    assert grid_of(by_ratio) == grid_of(by_count)


@pytest.mark.parametrize("engine", FORMS, ids=str)
def test_whatever_size_is_asked_for(engine: dict[str, Any], qwen_checkpoint: Path) -> None:
    """By the request, by the engine, and by both: the tokens of stock are right, and the budget holds."""
    processor = processor_of(qwen_checkpoint, mm_processor_kwargs=engine)
    image = Image.effect_noise((504, 392), 60).convert("RGB")
    for asked in FORMS:
        rows, columns = grid_of(process(processor, [image], **asked))
        result = process(processor, [image], resize(20), **asked)
        [report] = report_of(result)
        assert (report.visual_tokens, report.kept_tokens) == (rows * columns, 20)
        assert grid_of(result) == (4, 5)


def test_each_picture_policy_and_option_has_a_hash_of_its_own(processor: PrunedQwen2_5_VLProcessor) -> None:
    picture, other = (Image.effect_noise((500, 400), sigma).convert("RGB") for sigma in (60, 90))

    def item_hash(image: Image.Image, pruning: Mapping[str, Any] | None = None, **kwargs: Any) -> str:
        digest: str = process(processor, [image], pruning, **kwargs)["mm_hashes"]["image"][0]
        return digest

    hashes = [
        item_hash(picture),
        item_hash(picture, TOKENS),
        item_hash(picture, resize(24)),
        item_hash(picture, resize(60)),
        item_hash(other, resize(60)),
        item_hash(picture, resize(60), do_convert_rgb=False),
        item_hash(picture, resize(60), max_pixels=100_000),
    ]
    assert len(set(hashes)) == len(hashes)
    assert item_hash(picture, resize(60)) == hashes[3]
    assert item_hash(picture, resize(59)) == hashes[3], "the same grid"
    assert item_hash(picture, resize(252)) == item_hash(picture, resize(1.0)) == hashes[0], "the stock item"
    assert item_hash(picture, resize(251)) not in hashes


def test_a_name_without_a_picture_is_told_so_unless_its_size_is_known(processor: PrunedQwen2_5_VLProcessor) -> None:
    image = Image.effect_noise((300, 400), 60).convert("RGB")
    with pytest.raises(ValueError, match="data is not provided"):
        process(processor, [None], resize(9), ["never seen"])
    seen = process(processor, [image], resize(9), ["seen"])
    with pytest.raises(ValueError, match="Cache miss for image seen but data is not provided"):
        process(processor, [None], resize(9), ["seen"])  # no cache of vLLM's is there
    assert grid_of(seen) == (3, 2)


def test_a_picture_that_the_processor_cannot_take_is_an_error_of_the_client(
    processor: PrunedQwen2_5_VLProcessor,
) -> None:
    thin = Image.new("RGB", (900, 4))
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        process(processor, [thin], resize(9))
    for wrong in ({"max_pixels": "many"}, {"max_pixels": 0}, {"size": 5}, {"images_kwargs": 3}):
        with pytest.raises(ValueError, match=r"mm_processor_kwargs(\.images_kwargs)?: (no image|not an option)"):
            process(processor, [Image.new("RGB", (90, 90))], resize(9), **wrong)


def test_a_picture_that_is_only_scaled_is_not_encoded_early(processor: PrunedQwen2_5_VLProcessor) -> None:
    media = MediaWithBytes(Image.effect_noise((300, 400), 60).convert("RGB"), b"a picture")
    image = ImageJob(PruningPolicy.parse(resize(9)), url="https://a")
    with EarlyEncoding(processor, [image], {}) as early:
        early.start("https://a", media, {})
    assert image.encoding is None


def test_a_model_of_a_fixed_resolution_refuses_it() -> None:
    processor = pruning_processor(str(tiny_checkpoint()), "float32")
    with pytest.raises(PolicyError, match="method resize needs dynamic_resolution, which this model does not have"):
        process_prompt(processor, "<image>", sample_images(1), pruning=resize(9))


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker(qwen: Engine, qwen_checkpoint: Path) -> Checker:
    reference = VideoReference(qwen_checkpoint)
    image_processor = reference.processor.image_processor
    # or the smallest would be enlarged
    image_processor.size = {"shortest_edge": UNIT**2, "longest_edge": image_processor.size["longest_edge"]}
    return Checker(FAMILIES["qwen2_5_vl"], qwen, reference, Chat(qwen_checkpoint))


def pictures_of(name: str, size: tuple[int, int], count: int) -> list[Image.Image]:
    return [ImageOps.fit(image, size) for image in sample_images(count, stamp=name)]


def scaled(checker: Checker, image: Image.Image, k: int) -> Shown:
    """What transformers reads of the picture where it may have at most `k` tokens."""
    area = best_grid(image.size, k)[1]
    size, processor = SizeDict(shortest_edge=area, longest_edge=area), checker.reference.processor.image_processor
    [smaller] = processor.resize(pil_to_tensor(image)[None], size, resample=processor.resample, factor=UNIT)
    return Shown("scaled", to_pil_image(smaller), False)


def counts(images: Iterable[ImageReport]) -> list[tuple[str, int, int]]:
    return [(image.method, image.visual_tokens, image.kept_tokens) for image in images]


def compare(checker: Checker, answer: Answer, prompt: str, shown: Sequence[Shown]) -> None:
    checker.compare(answer, Ask(prompt), shown)


@pytest.mark.parametrize(("size", "k"), [((500, 400), 60), ((200, 800), 25), ((300, 300), 1)], ids=str)
def test_answers_are_those_of_the_smaller_picture(size: tuple[int, int], k: int, checker: Checker) -> None:
    [image] = pictures_of(f"resize {k}", size, 1)
    qwen, prompt, name = checker.engine, checker.chat.prompt([Turn(QUESTION, 1)]), f"resize {k}"
    encoded_before = qwen.encodings()
    answer = qwen.ask(Ask(prompt, [image], resize(k), [name]))
    assert qwen.encodings() == encoded_before
    compare(checker, answer, prompt, [scaled(checker, image, k)])
    (rows, columns), area = best_grid(size, k)
    by_hand = {"size": {"shortest_edge": area, "longest_edge": area}}
    stock = qwen.ask(Ask(prompt, [image], processor_kwargs=by_hand))
    assert assert_same(replace(answer, images=None), stock) == 0
    whole = qwen.ask(Ask(prompt, [image], uuids=[name]))
    compare(checker, whole, prompt, [Shown(name, image, False)])
    tokens = whole.prompt_ids.count(checker.reference.model.config.image_token_id)
    assert counts(reports(answer)) == [("resize", tokens, rows * columns)]


def test_scaled_pruned_unpruned_and_cached_in_every_order(checker: Checker) -> None:
    qwen, policies = checker.engine, [resize(20), TOKENS, False, resize(5000)]
    prompt = checker.chat.prompt([Turn(QUESTION, 4)])
    for number, order in enumerate(list(permutations(range(4)))[::5]):
        images = pictures_of(f"resize order {number}", (224, 336), 4)
        names = [f"resize order {number} {index}" for index in range(4)]
        qwen.ask(Ask(checker.chat.prompt([Turn(QUESTION, 1)]), images[:1], resize(20), names[:1]))
        request = Ask(
            prompt,
            [images[index] for index in order],
            {"images": [policies[index] for index in order]},
            [names[index] for index in order],
        )
        answer, again = qwen.ask(request), qwen.ask(request)
        shown = [Shown(*each) for each in zip(names, images, (False, TOKENS, False, False), strict=True)]
        shown[0] = scaled(checker, images[0], 20)
        named, kept = ["resize", "resprune", "none", "resize"], [15, 24, 96, 96]
        for each in (answer, again):
            compare(checker, each, prompt, [shown[index] for index in order])
            assert counts(reports(each)) == [(named[index], 96, kept[index]) for index in order]
            whys = [report.bypass_reason for report in reports(each)]
            assert whys == ["budget_not_below_tokens" if index == 3 else None for index in order]
        assert [report.cached for report in reports(answer)] == [index == 0 for index in order]
        assert [report.cached for report in reports(again)] == [index != 2 for index in order]
        assert again.prefix_hits >= (len(again.prompt_ids) - BLOCK) // BLOCK * BLOCK


def test_videos_pass_unpruned_in_either_order(checker: Checker) -> None:
    ask_about_a_video(checker, "<|video_pad|>", resize(24), lambda still: scaled(checker, still.image, 24))


def test_a_picture_may_be_named_alone_once_it_was_seen(qwen: Engine) -> None:
    [image] = pictures_of("resize named", (400, 300), 1)
    prompt = "<|image_pad|>Where?"
    first = qwen.ask(Ask(prompt, [image], resize(40), ["named"]))
    again = qwen.ask(Ask(prompt, [None], resize(40), ["named"]))
    assert_same(again, first)
    assert [report.cached for report in reports(first) + reports(again)] == [False, True]
    assert uncached(again.images) == first.images
    with pytest.raises(ValueError, match="data is not provided"):
        qwen.ask(Ask(prompt, [None], resize(12), ["named"]))
