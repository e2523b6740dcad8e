"""How tokens lie: the layouts say what transformers' models do, and count what vLLM's processors count."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaOnevisionModel, SiglipVisionConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, get_anyres_image_grid_shape

from tests.support.processors import process_prompt, processor_of
from tests.support.samples import examples
from vllm_vtprune.families import FAMILIES
from vllm_vtprune.features import Layout
from vllm_vtprune.plugin.families.internvl import tiled
from vllm_vtprune.plugin.families.internvl_chat import PrunedInternVLChatProcessor
from vllm_vtprune.plugin.families.llava import PrunedLlavaProcessor
from vllm_vtprune.plugin.families.llava_next import anyres
from vllm_vtprune.plugin.image import preprocess
from vllm_vtprune.plugin.reading import resize_canvas
from vllm_vtprune_checkpoints import write_checkpoint

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LENGTH = 24  # tokens of a square's side
NEWLINE = -1


def sizes(least: int, most: int) -> Any:
    """Heights and widths, in pixels."""
    return st.tuples(st.integers(least, most), st.integers(least, most))


@examples(500)
@given(size=sizes(1, 5000))
@example(size=(1, 5000))
@example(size=(5000, 1))
@example(size=(1, 73))
@example(size=(73, 1))
@example(size=(14, 1008))
@example(size=(1008, 14))
@example(size=(2, 3))
def test_anyres_is_what_transformers_packs(size: tuple[int, int]) -> None:
    layout = anyres(size, pinpoints=PINPOINTS, image_size=336, side=LENGTH)
    down, across = get_anyres_image_grid_shape(size, [list(point) for point in PINPOINTS], 336)
    vision = SimpleNamespace(image_size=336, patch_size=14)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=list(PINPOINTS)))
    numbered = torch.arange((1 + down * across) * LENGTH**2, dtype=torch.float64).view(-1, LENGTH**2, 1)
    newline = torch.tensor([NEWLINE], dtype=torch.float64)
    [packed], _ = LlavaNextModel.pack_image_features(model, [numbered], torch.tensor([size]), "default", newline)
    rows = packed[:, 0].long()

    assert layout.patches == numbered.numel()
    assert torch.equal(layout.connector_rows, rows[rows != NEWLINE])
    assert torch.equal(layout.embed_rows, (rows != NEWLINE).nonzero()[:, 0])
    tiles = layout.tiles
    assert tiles.canvas is not None
    assert (tiles.overview, tiles.grids[0], layout.newlines) == (0, (LENGTH, LENGTH), int((rows == NEWLINE).sum()))
    squares = layout.connector_rows // LENGTH**2
    assert torch.equal(tiles.ids, squares.unique(return_inverse=True)[1])
    assert tiles.ids.bincount().tolist() == [prod(grid) for grid in tiles.grids]
    areas = [(bottom - top) * (right - left) for top, left, bottom, right in filter(None, tiles.boxes)]
    assert sum(areas) == pytest.approx(1 if areas else 0)


SQUARES = [(27 * 14 * rows, 27 * 14 * columns) for rows in range(1, 7) for columns in range(1, 7)]


def ranks(values: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = values.unique(return_inverse=True)[1]
    return inverse


@examples(200)
@given(size=sizes(1, 3000))
@example(size=(1200, 1300))  # scaled down
@example(size=(2000, 1000))
@example(size=(1, 3000))
@example(size=(3000, 1))
def test_anyres_scales_as_transformers_does(size: tuple[int, int]) -> None:
    """LLaVA-OneVision's canvas of more than 9 squares, in patches that are numbered by row and by column."""
    side = 27
    layout = anyres(size, pinpoints=tuple(SQUARES), image_size=378, side=side, max_squares=9)
    down, across = get_anyres_image_grid_shape(size, [list(point) for point in SQUARES], 378)
    vision = SimpleNamespace(image_size=378, patch_size=14)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=SQUARES))
    places = torch.cartesian_prod(torch.arange(down * side), torch.arange(across * side)).double()
    squares = places.view(down, side, across, side, 2).transpose(1, 2).reshape(down * across, side**2, 2)
    newline = torch.full((2,), torch.nan, dtype=torch.float64)
    given_patches = torch.cat([torch.zeros(1, side**2, 2), squares])
    [packed], _ = LlavaOnevisionModel.pack_image_features(model, [given_patches], torch.tensor([size]), newline)
    is_token = ~packed.isnan().any(dim=1)

    assert layout.tiles.canvas is not None
    assert layout.patches == given_patches.shape[0] * side**2
    assert torch.equal(layout.embed_rows, is_token.nonzero()[:, 0])
    assert layout.newlines == int((~is_token).sum())
    values = given_patches.flatten(0, 1)[layout.connector_rows]
    values = values if layout.connector_canvas is None else resize_canvas(values, layout)
    torch.testing.assert_close(values, packed[is_token])
    middles = (packed[is_token][side**2 :] + 0.5) / side
    clear = ((middles - middles.round()).abs() > 1e-4).all(dim=1)  # of the seam of two squares
    expected = middles.floor()[clear] @ torch.tensor([across, 1.0]).double()
    assert torch.equal(ranks(layout.tiles.ids[side**2 :][clear]), ranks(expected))
    assert layout.tiles.ids.bincount().tolist() == [prod(grid) for grid in layout.tiles.grids]


def test_the_papers_2880_tokens() -> None:
    layout = anyres((672, 672), pinpoints=PINPOINTS, image_size=336, side=LENGTH)
    assert count(layout) == 2880 + 48
    assert layout.tiles.grids == ((LENGTH, LENGTH),) * 5
    assert layout.tiles.boxes == (None, (0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1))


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (3, 2), (12, 1)])
def test_tiles_and_their_thumbnail(rows: int, columns: int, thumbnail: bool) -> None:
    layout = tiled(rows, columns, patches=6, merge=2, thumbnail=thumbnail)
    if rows * columns == 1:
        assert (layout.patches, layout.grid, layout.tiles) == (36, (3, 3), None)
        return
    total = rows * columns + thumbnail
    tiles = layout.tiles
    assert layout.grid is layout.connector_rows is layout.embed_rows is None
    assert layout.patches == total * 36
    assert tiles.ids.tolist() == [tile for tile in range(total) for _ in range(9)]
    assert (tiles.grids, tiles.canvas) == (((3, 3),) * total, None)
    assert tiles.overview == (total - 1 if thumbnail else None)
    boxes = [(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)]
    assert tiles.boxes == ((*boxes, None) if thumbnail else tuple(boxes))


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a checkpoint without weights: no model is built."""
    return processor_of(write_checkpoint(request.param, tmp_path_factory.mktemp("family"), weights=False))


@examples(40)
@given(size=sizes(4, 700))
@example(size=(4, 400))
@example(size=(400, 4))
def test_layouts_count_the_placeholders_of_the_stock_processor(processor: Any, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size[::-1])
    layout = preprocess(processor, picture).layout
    result = process_prompt(processor, processor.dummy_inputs.get_dummy_text({"image": 1}), [picture])
    [place] = result["mm_placeholders"]["image"]
    assert count(layout) == place.get_num_embeds()
    assert count(layout) <= processor.max_image_tokens()


def count(layout: Layout) -> int:
    """Rows of the model's embeddings of an image: its tokens and newlines."""
    if layout.grid is not None:
        return prod(layout.grid)
    return len(layout.tiles.ids) + layout.newlines


@pytest.mark.parametrize("processor", ["internvl", "internvl_chat"], indirect=True)
@pytest.mark.parametrize("size", [(300, 900), (900, 300), (700, 690), (448, 448), (1200, 800)])
def test_tiles_show_the_parts_that_their_boxes_say(processor: Any, size: tuple[int, int]) -> None:
    """In a picture whose red grows from left to right, and green from top to bottom."""
    height, width = size
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90).resize((width, height))
    picture = Image.merge("RGB", (right, down, Image.new("L", (width, height))))
    image = preprocess(processor, picture)
    item = image.item
    pixels = item["pixel_values" if "pixel_values" in item else "pixel_values_flat"].data
    if image.layout.tiles is None:
        assert len(pixels) == 1
        return
    boxes = [box or (0.0, 0.0, 1.0, 1.0) for box in image.layout.tiles.boxes]
    assert len(pixels) == len(boxes)
    means = pixels.mean(dim=(2, 3))
    for colour, start, end in ((0, 1, 3), (1, 0, 2)):
        middles = torch.tensor([(box[start] + box[end]) / 2 for box in boxes])
        if middles.std() > 0:
            slope = torch.corrcoef(torch.stack([middles, means[:, colour].to(middles)]))[0, 1]
            assert slope > 0.999


def test_checkpoints_whose_tokens_are_not_their_patches_are_not_pruned() -> None:
    encoders = {"SigLIP": SiglipVisionConfig(), "CLIP": CLIPVisionConfig()}
    pruned = [
        (encoder, strategy)
        for encoder, vision in encoders.items()
        for strategy in ("default", "full")
        if PrunedLlavaProcessor.prunes(LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy))
    ]
    assert pruned == [("SigLIP", "full"), ("CLIP", "default")]
    assert PrunedInternVLChatProcessor.prunes(SimpleNamespace(ps_version="v2"))
    assert not PrunedInternVLChatProcessor.prunes(SimpleNamespace(ps_version="v1")), "its tokens go down the columns"


@pytest.mark.parametrize("processor", ["qwen2_5_vl"], indirect=True)
@examples(100)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_windows_are_undone(processor: Any, rows: int, columns: int) -> None:
    """Qwen2.5-VL's merger is given the tokens by windows of 4 x 4, smaller ones at the edges."""
    grid = SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * columns]))
    layout = processor.layout({"image_grid_thw": grid}, (28 * rows, 28 * columns), {})
    order = [
        (row, column)
        for top in range(0, rows, 4)
        for left in range(0, columns, 4)
        for row in range(top, min(top + 4, rows))
        for column in range(left, min(left + 4, columns))
    ]
    given_at = {place: index for index, place in enumerate(order)}
    assert layout.grid == (rows, columns)
    assert layout.patches == 4 * rows * columns
    assert layout.connector_rows.tolist() == [given_at[row, column] for row in range(rows) for column in range(columns)]
