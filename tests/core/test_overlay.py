"""What is kept stays as it is in the drawing, and what is dropped fades, wherever the tokens stand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_vtprune import VisualFeatures
from vllm_vtprune.features import Box, Tiles
from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.overlay import CAPTION, GAP, HATCH, MARGIN, OUTLINE, draw_kept, with_caption


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 200, (height, width, 3), dtype=np.uint8))  # nothing is white


def features(n: int, **place: object) -> VisualFeatures:
    return VisualFeatures(torch.ones(n, 2), torch.ones(n, 2), **place)  # type: ignore[arg-type]


def draw(
    image: Image.Image, features: VisualFeatures, kept: Sequence[int], view: Box = (0.0, 0.0, 1.0, 1.0)
) -> Image.Image:
    return draw_kept(image, KeptTokens.of(features, torch.tensor(kept, dtype=torch.long), view))


def unfaded(drawn: Image.Image, image: Image.Image) -> np.ndarray:
    """(H, W): the pixels that are those of the image."""
    return (np.asarray(drawn) == np.asarray(image)).all(axis=2)


def test_one_grid_over_the_whole_image() -> None:
    image = picture(60, 40)
    drawn = unfaded(draw(image, features(6, grid=(2, 3)), [0, 5]), image)
    expected = np.zeros((40, 60), dtype=bool)
    expected[:20, :20] = expected[20:, 40:] = True
    assert (drawn == expected).all()


def test_what_the_model_does_not_see_fades() -> None:
    image = picture(80, 40)
    everything = draw(image, features(4, grid=(2, 2)), range(4), (0.0, 0.25, 1.0, 0.75))
    expected = np.zeros((40, 80), dtype=bool)
    expected[:, 20:60] = True
    assert (unfaded(everything, image) == expected).all()
    dropped = draw(image, features(4, grid=(2, 2)), [], (0.0, 0.25, 1.0, 0.75))
    seen, unseen = np.asarray(dropped)[:, 20:60], np.asarray(dropped)[:, :20]
    assert (seen == OUTLINE).all(axis=2).any(), "outlines of tokens"
    assert not (seen == HATCH).all(axis=2).any()
    assert (unseen == HATCH).all(axis=2).mean() == pytest.approx(2 / 12, abs=0.03), "hatched"


def test_tiles_and_overview_are_drawn_side_by_side() -> None:
    left, right = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
    tiles = Tiles(torch.tensor([0, 0, 1, 1, 2, 2]), ((1, 2), (2, 1), (1, 2)), (left, right, None))
    image = picture(40, 20)
    drawn = draw(image, features(6, tiles=tiles), [1, 2, 4])
    assert drawn.size == (2 * 40 + GAP, 20)
    of_tiles, of_overview = drawn.crop((0, 0, 40, 20)), drawn.crop((40 + GAP, 0, 80 + GAP, 20))
    expected = np.zeros((20, 40), dtype=bool)
    expected[:, 10:20] = expected[:10, 20:] = True
    assert (unfaded(of_tiles, image) == expected).all()
    expected[:] = False
    expected[:, :20] = True
    assert (unfaded(of_overview, image) == expected).all()


@pytest.mark.parametrize(("canvas", "n", "panels"), [((2, 2), 5, 2), ((0, 2), 1, 1)])
def test_a_canvas_of_several_tiles_is_one_panel(canvas: tuple[int, int], n: int, panels: int) -> None:
    ids = torch.tensor([0, 1, 1, 2, 2][:n])
    grids = ((1, 1), (1, 2), (1, 2))[: 1 + (n > 1) * 2]
    boxes = (None, (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))[: len(grids)]
    image = picture(20, 20)
    drawn = draw(image, features(n, tiles=Tiles(ids, grids, boxes, canvas)), [0])
    assert drawn.width == panels * 20 + (panels - 1) * GAP
    assert unfaded(drawn.crop((drawn.width - 20, 0, drawn.width, 20)), image).all(), "the overview is kept whole"
    if panels == 2:
        assert not unfaded(drawn.crop((0, 0, 20, 20)), image).any()


def test_tokens_without_a_place_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no known positions"):
        draw(picture(4, 4), features(4), [0])


@pytest.mark.parametrize(
    ("line", "count"),
    [('{"budget":{"type":"tokens","keep":128},"method":"adaptprune"}: keeps', 4), ("a " * 60, 5), ("one\ntwo", 1)],
)
def test_a_caption_is_broken_at_the_width_of_its_picture(line: str, count: int) -> None:
    captioned = with_caption(picture(160, 40), line)
    assert captioned.size == (160, 40 + CAPTION * count)
    dark = np.asarray(captioned.convert("L"))[40:] < 128
    assert dark.reshape(count, CAPTION, 160).any(axis=(1, 2)).all(), "each row has text"
    assert not dark[:, -MARGIN:].any(), "and none is cut off"
