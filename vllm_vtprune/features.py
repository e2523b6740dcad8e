"""The visual tokens of one image, before and after the projector, and their layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Protocol, TypeAlias

from vllm_vtprune.lazy import Tensor, torch

Box: TypeAlias = tuple[float, float, float, float]
"""A part of an image: top, left, bottom, right, as fractions of its height and width."""

EMBED = -1
"""In the ids of an image's placeholder: a visual token."""


def require_finite(name: str, values: Tensor) -> None:
    """Raise a ValueError unless all ``values`` are finite in float32. One pass, through their sum."""
    values = values.float() if values.dtype == torch.float64 else values
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    if not torch.isfinite(total) and not torch.isfinite(values).all():  # a sum of finite values may overflow
        raise ValueError(f"{name} must be finite")


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which tile every token belongs to, for models that cut an image into tiles.

    Attributes:
        ids: ``(N,)`` int64 index of the token's tile in ``grids``; tokens of a tile are in raster order.
        grids: rows and columns of each tile, in tokens.
        boxes: the part of the image that each tile shows, None for the overview. Empty if unknown.
        canvas: rows and columns, in tokens, of the map that all tiles but the overview form, for models that read it as
            one raster after the overview. Either may be 0. None if tiles are read one after the other.
    """

    ids: Tensor
    grids: tuple[tuple[int, int], ...]
    boxes: tuple[Box | None, ...] = ()
    canvas: tuple[int, int] | None = None

    @property
    def overview(self) -> int | None:
        """Index of the tile that shows the whole image; None if there is none or it is unknown."""
        overviews = [i for i, box in enumerate(self.boxes) if box is None]
        return overviews[0] if len(overviews) == 1 else None


class Counted(Protocol):
    """Something with the visual tokens of an image: its layout, its features, or its energies."""

    @property
    def num_tokens(self) -> int:
        """``N``."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """As of `VisualFeatures`."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of an image's N visual tokens, in the order in which the language model reads them.

    Attributes:
        patches: patches that the encoder computes for the image.
        grid, tiles: see `VisualFeatures`.
        connector_rows: ``(N,)`` int64 index of each token's row in the image's connector input. None if the
            order is the same.
        connector_canvas: rows and columns of the canvas in the connector input, if the model resizes it (bilinear) to
            ``tiles.canvas`` after the connector; ``connector_rows`` then indexes this canvas. Else None.
        embed_rows: ``(N,)`` int64 index of each token's row in the model's embeddings of the image; other rows are
            newlines. None if all rows are tokens.
        prompt, distinct, border_tokens: see `VisualFeatures`.
    """

    patches: int
    grid: tuple[int, int] | None = None
    tiles: Tiles | None = None
    connector_rows: Tensor | None = None
    connector_canvas: tuple[int, int] | None = None
    embed_rows: Tensor | None = None
    prompt: tuple[int, ...] | None = None
    distinct: tuple[int, ...] | None = None
    border_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """``N``."""
        if self.tiles is not None:
            return len(self.tiles.ids)
        if self.grid is not None:
            return prod(self.grid)
        assert self.prompt is not None
        return self.prompt.count(EMBED)

    @property
    def newlines(self) -> int:
        """Newlines of the image, each of which is kept (`vllm_vtprune.sequence`)."""
        if self.embed_rows is None or self.tiles is None or self.tiles.canvas is None:
            return 0
        return self.tiles.canvas[0]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """As of `VisualFeatures`."""
        return planes_of(self.grid, self.tiles)

    def without_duplicates(self) -> Layout:
        """The layout of the tokens of ``distinct``, whose positions do not matter; the same object without those."""
        return self if self.distinct is None else replace(self, grid=(1, len(self.distinct)), tiles=None, distinct=None)

    def dump(self) -> dict[str, Any]:
        """The layout as JSON values; `load` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.tiles is not None:
            tiles = self.tiles
            values["tiles"] = {field.name: getattr(tiles, field.name) for field in fields(tiles)}
            values["tiles"]["ids"] = tiles.ids.tolist()
        for name in ("connector_rows", "embed_rows"):
            values[name] = None if values[name] is None else values[name].tolist()
        return values

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> Layout:
        """A layout from what `dump` gave, also after a passage through JSON."""
        loaded: dict[str, Any] = {name: _as_tuple(value) for name, value in values.items()}
        if values["tiles"] is not None:
            tiles = {name: _as_tuple(value) for name, value in values["tiles"].items()}
            loaded["tiles"] = Tiles(**{**tiles, "ids": torch.tensor(tiles["ids"])})
        for name in ("connector_rows", "embed_rows"):
            loaded[name] = None if values[name] is None else torch.tensor(values[name])
        return cls(**loaded)


def planes_of(grid: tuple[int, int] | None, tiles: Tiles | None) -> tuple[tuple[int, int], ...]:
    """``grids`` of `VisualFeatures` with this grid and these tiles."""
    if tiles is None:
        return () if grid is None else (grid,)
    if tiles.canvas is None:
        return tiles.grids
    assert tiles.overview is not None
    overview = tiles.grids[tiles.overview]
    return (overview, tiles.canvas) if prod(tiles.canvas) else (overview,)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One preprocessed image.

    Attributes:
        item: vLLM's item, with the model's input fields.
        layout: layout of its visual tokens.
    """

    item: Any
    layout: Layout

    @property
    def nbytes(self) -> int:
        """Bytes of the item's tensors."""
        return sum(_nbytes(elem.data) for elem in self.item.values())


def _nbytes(data: Any) -> int:
    return sum(map(_nbytes, data)) if isinstance(data, list | tuple) else getattr(data, "nbytes", 0)


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """The ``N`` visual tokens of one image.

    Attributes:
        encoder: ``(N, d_v)`` projector input, CLS removed. Spectral energy is measured in this space.
        embeds: ``(N, d)`` projector output, in the language model's input space. Tokens are selected in this space.
        grid: rows and columns in tokens, row-major; ``H * W == N``. None if the tokens form no single grid.
        tiles: tile of every token, for tiled models.
        cls_attention: ``(N,)`` attention from the encoder's CLS token, mean over heads.
        overview_attention: ``(n,)`` early-layer CLS attention of the overview's tokens, for tiled models.
        newline: ``(d + p,)`` embedding after each row of ``tiles.canvas``; None if there is none.
        deepstack: ``(N, p)`` inputs of deeper layers of the language model (DeepStack); kept with the token, not used
            by any method.
        keys: ``(N, d_k)`` keys of the same encoder layer, mean over heads, for methods that merge by them.
        prompt: ids of the image's placeholder, `EMBED` for each of the N tokens. None if placeholders of all images
            differ only in N.
        distinct: indices of the tokens that are no exact duplicates, if the policy drops duplicates; else None.
        border_tokens: further tokens that the image had with the borders that were cropped; None if none are.

    Raises:
        ValueError: shapes or types contradict each other; the message names the field.
    """

    encoder: Tensor
    embeds: Tensor
    grid: tuple[int, int] | None = None
    tiles: Tiles | None = None
    cls_attention: Tensor | None = None
    overview_attention: Tensor | None = None
    keys: Tensor | None = None
    deepstack: Tensor | None = None
    newline: Tensor | None = None
    prompt: tuple[int, ...] | None = None
    distinct: tuple[int, ...] | None = None
    border_tokens: int | None = None

    def __post_init__(self) -> None:
        n = self.embeds.shape[0] if self.embeds.ndim else 0
        if n == 0:
            raise ValueError(f"embeds must have shape (N, d) with N >= 1, got {tuple(self.embeds.shape)}")
        rank = dict(encoder=2, embeds=2, keys=2, deepstack=2, cls_attention=1, overview_attention=1, newline=1)
        for name, value in self._tensors().items():
            if value.ndim != rank[name] or 0 in value.shape:
                raise ValueError(f"{name} must have {rank[name]} non-empty dimension(s), got {tuple(value.shape)}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
            if name not in ("overview_attention", "newline") and value.shape[0] != n:
                raise ValueError(f"{name} has {value.shape[0]} tokens, but embeds has {n}")
        if self.grid is not None and (min(self.grid) < 1 or prod(self.grid) != n):
            raise ValueError(f"grid {self.grid} does not hold {n} tokens")
        if self.prompt is not None and self.prompt.count(EMBED) != n:
            raise ValueError(f"prompt has {self.prompt.count(EMBED)} placeholder tokens, but embeds has {n}")
        if self.tiles is not None and self.tiles.ids.shape != (n,):
            raise ValueError(f"tiles.ids must have shape ({n},), got {tuple(self.tiles.ids.shape)}")
        if self.tiles is not None and self.tiles.boxes and len(self.tiles.boxes) != len(self.tiles.grids):
            raise ValueError(f"tiles.boxes has {len(self.tiles.boxes)} entries, but there are {len(self.tiles.grids)}")
        if self.tiles is not None and self.tiles.canvas is not None:
            if self.tiles.overview is None:
                raise ValueError("tiles.canvas needs an overview: one tile whose box is None")
            if prod(self.tiles.canvas) + prod(self.tiles.grids[self.tiles.overview]) != n:
                raise ValueError(f"tiles.canvas {self.tiles.canvas} and the overview do not hold {n} tokens")

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}

    @property
    def num_tokens(self) -> int:
        """``N``."""
        return self.embeds.shape[0]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each plane of neighbouring tokens: image, each tile, or overview and canvas.

        Empty if positions are unknown.
        """
        return planes_of(self.grid, self.tiles)

    @property
    def canvas(self) -> tuple[int, int]:
        """Rows and columns of ``tiles.canvas``, for features that have one."""
        assert self.tiles is not None
        assert self.tiles.canvas is not None
        return self.tiles.canvas

    @property
    def boxes(self) -> tuple[Box | None, ...]:
        """The part of the image that each plane of ``grids`` shows: None for the overview, the image if unknown."""
        image: Box = (0.0, 0.0, 1.0, 1.0)
        if self.tiles is not None and self.tiles.canvas is not None:
            return (None, image)[: len(self.grids)]
        boxes = () if self.tiles is None else self.tiles.boxes
        return boxes or (image,) * len(self.grids)

    @property
    def overview(self) -> Tensor | None:
        """``(n,)`` indices of the overview's tokens; None unless there are other tiles."""
        if self.tiles is None or self.tiles.overview is None or len(self.tiles.grids) == 1:
            return None
        return (self.tiles.ids == self.tiles.overview).nonzero()[:, 0]

    def without_duplicates(self) -> VisualFeatures:
        """The tokens of ``distinct``, without positions; the same object if there are no duplicates to drop."""
        if self.distinct is None or len(self.distinct) == self.num_tokens:
            return self
        indices = torch.tensor(self.distinct, device=self.embeds.device)
        taken = {name: tensor[indices] for name, tensor in self._tensors().items()}
        return replace(self, grid=None, tiles=None, prompt=None, distinct=None, **taken)  # type: ignore[arg-type]

    def planes(self) -> list[tuple[Tensor, tuple[int, int]]]:
        """For each of ``grids``: token indices ``(H * W,)`` in raster order, and ``(H, W)``.

        Raises:
            ValueError: a tile's token count does not match its grid.
        """
        if self.tiles is None:
            return [(torch.arange(self.num_tokens, device=self.embeds.device), grid) for grid in self.grids]
        ids = self.tiles.ids
        if self.tiles.canvas is not None:
            assert self.tiles.overview is not None
            ids = torch.ne(ids, self.tiles.overview).long()
        planes = [((ids == i).nonzero()[:, 0], grid) for i, grid in enumerate(self.grids)]
        for i, (positions, grid) in enumerate(planes):
            if len(positions) != prod(grid):
                raise ValueError(f"tile {i} has {len(positions)} tokens, but its grid {grid} has {prod(grid)}")
        if sum(len(positions) for positions, _ in planes) != self.num_tokens:
            raise ValueError(f"tiles.ids must be from 0 to {len(planes) - 1}")
        return planes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; a tensor shared by ``encoder`` and ``embeds`` counts once."""
        sizes = {id(t): t.nbytes for t in self._tensors().values()}
        return sum(sizes.values()) + (self.tiles.ids.nbytes if self.tiles is not None else 0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> VisualFeatures:
        """Move all tensors to ``device``; a shared tensor is moved once.

        ``non_blocking`` is PyTorch's: copies to the CPU use pinned memory and are complete after synchronisation.
        """
        moved: dict[int, Tensor] = {}
        for tensor in self._tensors().values():
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
        tiles = self.tiles
        if tiles is not None:
            tiles = replace(tiles, ids=tiles.ids.to(device, non_blocking=non_blocking))
        return replace(self, tiles=tiles, **{name: moved[id(t)] for name, t in self._tensors().items()})  # type: ignore[arg-type]
