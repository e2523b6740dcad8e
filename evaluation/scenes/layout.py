"""The layout of a scene: coloured shapes, handwritten digits, words and numbers on a ground.

Density varies: a third of the scenes each are sparse (one to three things), medium (four to ten) and dense (up to 34),
because an adaptive budget can only pay if pictures differ. Training starts on smaller canvases, 8 x 8 patches, and ends
on the 24 x 24 of the model.

The layout ensures that even a crowded scene has questions. One colour and one shape occur in 0 to 4 shapes (counted);
another colour and another shape occur once (referred to); the first few words each have a colour of their own. Every
patch shows at most one thing, and letters are at least a patch apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_vtprune_evaluation.scenes.splits import Draws, Split, draw_number, draw_word, split_of

PATCH = 14  # pixels

ItemKind = Literal["shape", "digit", "word", "number"]
Density = Literal["sparse", "medium", "dense", "packed"]
GroundKind = Literal["plain", "texture", "photograph"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
DENSITIES: tuple[Density, ...] = ("sparse", "medium", "dense")  # "packed", for training an encoder, only on request
MOST_COUNTED = 4
SHAPES_ONLY, MIXED, PAGE = (0.85, 0.15, 0.0), (0.5, 0.14, 0.2), (0.2, 0.1, 0.45)  # shapes, digits, words; else numbers


@dataclass(frozen=True)
class Item:
    """One thing in the picture. Pixels from the top left corner."""

    kind: ItemKind
    colour: str
    x: float  # of the centre
    y: float
    width: float
    height: float
    shape: str = ""  # of a shape
    mark: str = ""  # colour of the dot on a shape, if it has one
    text: str = ""  # of a digit, a word or a number
    look: int = 0  # seed for painting: font, rotation, handwriting

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2

    @property
    def pitch(self) -> float:
        """Pixels from one character to the next."""
        return self.width / len(self.text)


@dataclass(frozen=True)
class Scene:
    """The content of a picture."""

    split: Split
    seed: int
    grid: int  # patches a side
    density: Density
    ground: GroundKind
    items: tuple[Item, ...]
    counted_colour: str | None  # colour and shape of 0 to 4 shapes, all five numbers equally likely
    counted_shape: str | None

    @property
    def side(self) -> int:
        """Pixels of the square picture's side."""
        return self.grid * PATCH

    def of_kind(self, kind: ItemKind) -> list[Item]:
        """The items of a kind, in painting order."""
        return [item for item in self.items if item.kind == kind]


def make_scene(split: Split, seed: int, *, grid: int = 24, density: Density | None = None) -> Scene:
    """The scene of a split and a seed; `density` fixes the density, which is otherwise drawn."""
    draws = Draws("scene", split, seed, grid, density)
    while True:
        scene = _draw_scene(draws, split, seed, grid, draws.pick(DENSITIES if density is None else (density,)))
        if scene.items and split_of(layout_key(scene)) == split:
            return scene


def layout_key(scene: Scene) -> str:
    """A key of the layout: equal if the same kinds of things are in the same patches."""
    centres = sorted((item.kind, int(item.x) // PATCH, int(item.y) // PATCH) for item in scene.items)
    return f"{scene.grid} {centres}"


def _draw_scene(draws: Draws, split: Split, seed: int, grid: int, density: Density) -> Scene:
    most = min(34, grid * grid // 13)
    bounds = {"sparse": (1, 3), "medium": (4, min(10, most)), "dense": (max(4, most // 2), most), "packed": (50, 70)}
    mixtures = (PAGE,) if density == "packed" else (SHAPES_ONLY, MIXED, PAGE)
    kinds = _draw_kinds(draws, draws.whole(*bounds[density]), mixtures)
    shapes, counted_colour, counted_shape = _draw_shapes(draws, kinds.count("shape"))
    text_colours = {kind: _draw_text_colours(draws, kinds.count(kind)) for kind in ("digit", "word", "number")}

    taken: set[tuple[int, int]] = set()
    items = []
    shapes_first = sorted(kinds, key="shape word number digit".split().index)  # planned, so placed first
    for kind in shapes_first if density != "packed" else draws.shuffled(kinds):
        if kind == "shape":
            colour, shape = shapes.pop()
            mark = draws.pick([other for other in COLOURS if other != colour]) if draws.chance(0.4) else ""
            text = ""
            width = height = _draw_side(draws, grid)
        else:
            colour, shape, mark = text_colours[kind].pop(), "", ""
            if kind == "digit":
                text = str(draws.whole(0, 9))
                width = height = _draw_side(draws, grid)
            else:
                text = draw_word(draws, split) if kind == "word" else draw_number(draws, split)
                pitch = draws.real(PATCH, max(PATCH, grid)) if grid < 24 else draws.real(15, 26)
                width, height = pitch * len(text), pitch * draws.real(1.1, 1.4)
        place = _find_place(draws, grid, width, height, taken)
        if place is None:
            continue
        x, y, patches = place
        taken |= patches
        items.append(Item(kind, colour, x, y, width, height, shape, mark, text, draws.whole(0, 1 << 30)))

    kept = [item for item in items if item.kind == "shape"]
    complete = len(kept) == kinds.count("shape") >= MOST_COUNTED
    return Scene(
        split,
        seed,
        grid,
        density,
        draws.pick(("plain", "texture", "photograph")),
        tuple(items),
        counted_colour if complete else None,
        counted_shape if complete else None,
    )


def _draw_kinds(draws: Draws, count: int, mixtures: Sequence[tuple[float, float, float]]) -> list[ItemKind]:
    shape, digit, word = draws.pick(mixtures)
    kinds: list[ItemKind] = []
    for _ in range(count):
        draw = draws.unit()
        kinds.append(
            "shape"
            if draw < shape
            else "digit"
            if draw < shape + digit
            else "word"
            if draw < shape + digit + word
            else "number"
        )
    return kinds


def _draw_shapes(draws: Draws, count: int) -> tuple[list[tuple[str, str]], str, str]:
    """Colours and shapes of `count` items, the counted colour and the counted shape."""
    counted_colour, single_colour, *colours = draws.shuffled(COLOURS)
    counted_shape, single_shape, *shapes = draws.shuffled(SHAPES)
    columns = []
    for counted, single, others in ((counted_colour, single_colour, colours), (counted_shape, single_shape, shapes)):
        column = [counted] * min(count, draws.whole(0, MOST_COUNTED))
        column += [single] * (len(column) < count)
        column += [draws.pick(others) for _ in range(count - len(column))]
        columns.append(draws.shuffled(column))
    return list(zip(*columns, strict=True)), counted_colour, counted_shape


def _draw_text_colours(draws: Draws, count: int) -> list[str]:
    """Colours of `count` texts: four occur once, the rest share the others."""
    order = draws.shuffled(COLOURS)
    return draws.shuffled(order[: min(count, 4)] + [draws.pick(order[4:]) for _ in range(count - 4)])


def _draw_side(draws: Draws, grid: int) -> float:
    smallest, largest = (22.0, 70.0) if grid >= 16 else (PATCH, 2.3 * grid)
    return smallest + (largest - smallest) * draws.unit() ** 2  # small ones are more common


def _find_place(
    draws: Draws, grid: int, width: float, height: float, taken: set[tuple[int, int]]
) -> tuple[float, float, set[tuple[int, int]]] | None:
    """Draw a free place: centre and patches; None after 30 failures."""
    half_width, half_height = width / 2 + 2, height / 2 + 2  # outlines
    side = grid * PATCH
    if 2 * half_width > side:
        return None
    for _ in range(30):
        x, y = draws.real(half_width, side - half_width), draws.real(half_height, side - half_height)
        patches = {
            (row, column)
            for row in _span(y - half_height, y + half_height, grid)
            for column in _span(x - half_width, x + half_width, grid)
        }
        if taken.isdisjoint(patches):
            return x, y, patches
    return None


def _span(low: float, high: float, grid: int) -> Sequence[int]:
    """The patches from pixel `low` to pixel `high` along one side."""
    return range(max(0, int(low // PATCH)), min(grid - 1, int(high // PATCH)) + 1)
