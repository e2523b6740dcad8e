"""Questions about a scene, of nine kinds, each with a short answer.

Yes and no are balanced, so a model that ignores the picture does no better than chance: they are drawn before the
question, and only where both are possible. Other answers are as likely as the layout makes them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_vtprune_evaluation.scenes.layout import COLOURS, MOST_COUNTED, SHAPES, Item, Scene
from vllm_vtprune_evaluation.scenes.splits import Draws

DIGITS = "0123456789"
MARGIN = 4  # least pixels between two things of which one is left of, or above, the other


@dataclass(frozen=True)
class Question:
    """`about`: for each thing that the question names, in order, the items that it means, if any."""

    kind: str
    text: str
    answer: str
    about: tuple[tuple[Item, ...], ...] = field(default=(), repr=False)


Things = Sequence[Item]
Asked = tuple[str, str, Sequence[Things]]  # question, answer, `Question.about`


def ask(scene: Scene, count: int = 9, *, kinds: Sequence[str] | None = None) -> list[Question]:
    """Up to `count` questions, at most one of each kind; always the same for a scene.

    More of a kind would unbalance the answers: a scene of one thing has one question with "yes" and many with "no".
    """
    draws = Draws("questions", scene.split, scene.seed, scene.grid)
    asked = (_try(kind, scene, draws) for kind in draws.shuffled(list(kinds or KINDS)))
    return [question for question in asked if question is not None][:count]


def pack(scene: Scene, count: int) -> list[Question]:
    """`count` questions to train on: every kind in turn, hard kinds more often. They repeat if a scene has too few.

    Any colour or shape is counted here, so that smaller canvases have counting questions, too.
    """
    draws = Draws("pack", scene.split, scene.seed, scene.grid)
    questions: list[Question] = []
    while len(questions) < count:
        asked = (_try(kind, scene, draws, training=True) for kind in draws.shuffled([*KINDS, *HARD]))
        questions += [question for question in asked if question is not None]
    return questions[:count]


HARD = ("count", "count", "reading", "relation")


def _try(kind: str, scene: Scene, draws: Draws, training: bool = False) -> Question | None:
    for _ in range(4):  # a form may not suit the scene
        asked = (count_any if training and kind == "count" else KINDS[kind])(scene, draws)
        if asked is not None:
            text, answer, about = asked
            return Question(kind, text, answer, tuple(map(tuple, about)))
    return None


def a(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def reference(item: Item) -> str:
    """The words that refer to an item: 'red circle', 'handwritten 7', 'word'."""
    if item.kind == "shape":
        return f"{item.colour} {item.shape}"
    return f"handwritten {item.text}" if item.kind == "digit" else item.kind


def singles(scene: Scene) -> list[tuple[str, Item]]:
    """The items with a unique reference, and that reference."""
    references = [reference(item) for item in scene.items]
    occurrences = Counter(references)
    return [(name, item) for name, item in zip(references, scene.items, strict=True) if occurrences[name] == 1]


def _called(scene: Scene, name: str) -> list[Item]:
    return [item for item in scene.items if reference(item) == name]


def _absent(scene: Scene, draws: Draws, kind: str) -> str | None:
    """A reference to nothing in the picture. Of a coloured shape, colour and shape mostly occur, but apart."""
    present = {reference(item) for item in scene.items}
    if kind == "digit":
        names = [f"handwritten {digit}" for digit in DIGITS]
    elif kind == "shape":
        names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        if draws.chance(0.7):
            seen = {word for name in present for word in name.split()}
            near = [name for name in names if seen.issuperset(name.split())]
            if not present.issuperset(near):
                names = near
    else:
        names = ["word", "number"]
    names = [name for name in names if name not in present]
    return draws.pick(names) if names else None


def existence(scene: Scene, draws: Draws) -> Asked | None:
    """Whether there is a shape, a coloured shape, a digit, a word or a number."""
    form = draws.pick(("shape", "shape", "digit", "text", "plain shape"))
    yes = draws.chance(0.5)
    if form == "plain shape":
        names = {item.shape for item in scene.of_kind("shape")}
        wanted = [shape for shape in SHAPES if (shape in names) == yes]
        if not names or len(names) == len(SHAPES):
            return None
        name = draws.pick(wanted)
        matching = [item for item in scene.of_kind("shape") if item.shape == name]
        return f"Is there {a(name)}?", "yes" if yes else "no", [matching]
    kinds = ("word", "number") if form == "text" else (form,)
    present = sorted({reference(item) for item in scene.items if item.kind in kinds})
    absent = _absent(scene, draws, form)
    if not present or absent is None:
        return None
    name = draws.pick(present) if yes else absent
    return f"Is there {a(name)}?", "yes" if yes else "no", [_called(scene, name)]


def count(scene: Scene, draws: Draws) -> Asked | None:
    """How many shapes have a colour or a form: 0 to 4."""
    by_colour = draws.chance(0.5)
    value = scene.counted_colour if by_colour else scene.counted_shape
    return None if value is None else _counted(scene, value)


def count_any(scene: Scene, draws: Draws) -> Asked | None:
    """As `count`, for any colour or shape; all possible numbers are equally likely."""
    numbers: dict[int, list[str]] = {}
    shapes = scene.of_kind("shape")
    for value in (*COLOURS, *SHAPES):
        number = sum(value in (item.colour, item.shape) for item in shapes)
        if number <= MOST_COUNTED:
            numbers.setdefault(number, []).append(value)
    if not shapes:
        return None
    return _counted(scene, draws.pick(numbers[draws.pick(sorted(numbers))]))


def _counted(scene: Scene, value: str) -> Asked:
    name = f"{value} shapes" if value in COLOURS else "crosses" if value == "cross" else f"{value}s"
    counted = [item for item in scene.of_kind("shape") if value in (item.colour, item.shape)]
    return f"How many {name} are there?", str(len(counted)), [counted]


def colour(scene: Scene, draws: Draws) -> Asked | None:
    """The colour of a thing that is identified by something else."""
    shapes = Counter(item.shape for item in scene.of_kind("shape"))
    marks = Counter(item.mark for item in scene.of_kind("shape"))
    named = [(f"the {item.shape}", item) for item in scene.of_kind("shape") if shapes[item.shape] == 1]
    named += [
        (f"the shape with {a(item.mark)} dot", item)
        for item in scene.of_kind("shape")
        if item.mark and marks[item.mark] == 1
    ]
    named += [(f"the {name}", item) for name, item in singles(scene) if item.kind != "shape"]
    if not named:
        return None
    name, item = draws.pick(named)
    return f"What color is {name}?", item.colour, [[item]]


def shape(scene: Scene, draws: Draws) -> Asked | None:
    """The form of a shape that is identified by its colour or its dot."""
    shapes = scene.of_kind("shape")
    colours, marks = Counter(item.colour for item in shapes), Counter(item.mark for item in shapes)
    named = [(f"is {item.colour}", item) for item in shapes if colours[item.colour] == 1]
    named += [(f"has {a(item.mark)} dot", item) for item in shapes if item.mark and marks[item.mark] == 1]
    if not named:
        return None
    name, item = draws.pick(named)
    return f"Which shape {name}?", item.shape, [[item]]


def position(scene: Scene, draws: Draws) -> Asked | None:
    """The quarter of the picture that a thing lies in, if it lies in one entirely."""
    middle = scene.side / 2
    placed = [
        (name, f"{'top' if item.y < middle else 'bottom'} {'left' if item.x < middle else 'right'}", item)
        for name, item in singles(scene)
        if not item.left < middle < item.right and not item.top < middle < item.bottom
    ]
    if not placed:
        return None
    name, quarter, item = draws.pick(placed)
    return f"Where is the {name}?", quarter, [[item]]


def relation(scene: Scene, draws: Draws) -> Asked | None:
    """Whether one thing lies left of, right of, above or below another."""
    named = singles(scene)
    if len(named) < 2:
        return None
    (name, item), (other_name, other) = draws.shuffled(named)[:2]
    true = [
        words
        for words, apart in (
            (("left of", "right of"), other.left - item.right),
            (("right of", "left of"), item.left - other.right),
            (("above", "below"), other.top - item.bottom),
            (("below", "above"), item.top - other.bottom),
        )
        if apart >= MARGIN
    ]
    if not true:
        return None
    right, wrong = draws.pick(true)
    yes = draws.chance(0.5)
    return f"Is the {name} {right if yes else wrong} the {other_name}?", "yes" if yes else "no", [[item], [other]]


def reading(scene: Scene, draws: Draws) -> Asked | None:
    """A word or a number, letter by letter."""
    named = []
    for kind in ("word", "number"):
        texts = [item for item in scene.items if item.kind == kind]
        colours = Counter(item.colour for item in texts)
        named += [(f"Which {item.colour} {kind} is there?", item) for item in texts if colours[item.colour] == 1]
        if len(texts) == 1:
            named += [(f"Which {kind} is there?", item) for item in texts]
    if not named:
        return None
    text, item = draws.pick(named)
    return text, item.text, [[item]]


def detail(scene: Scene, draws: Draws) -> Asked | None:
    """The color of a small dot, or the value of a handwritten digit."""
    named = [
        (f"What color is the dot on the {name}?", item.mark, [[item]])
        for name, item in singles(scene)
        if item.kind == "shape" and item.mark
    ]
    digits = scene.of_kind("digit")
    colours = Counter(item.colour for item in digits)
    named += [
        (f"Which {item.colour} digit is handwritten?", item.text, [[item]])
        for item in digits
        if colours[item.colour] == 1
    ]
    return draws.pick(named) if named else None


def two_facts(scene: Scene, draws: Draws) -> Asked | None:
    """Whether one thing is there and another is, or is not."""
    kinds = ("word", "number") if (kind := draws.pick(("shape", "shape", "digit", "text"))) == "text" else (kind,)
    present = sorted({reference(item) for item in scene.items})
    alike = sorted({reference(item) for item in scene.items if item.kind in kinds})
    absent = _absent(scene, draws, kind)
    if len(present) < 2 or not alike or absent is None:
        return None
    second = draws.pick(alike)
    first = draws.pick([name for name in present if name != second])
    yes = draws.chance(0.5)
    if draws.chance(0.5):
        pair = draws.shuffled([first, second if yes else absent])
        text = f"Is there {a(pair[0])} and {a(pair[1])}?"
    else:
        pair = [first, absent if yes else second]
        text = f"Is there {a(pair[0])} but no {pair[1]}?"
    return text, "yes" if yes else "no", [_called(scene, name) for name in pair]


KINDS: dict[str, Callable[[Scene, Draws], Asked | None]] = {
    "existence": existence,
    "count": count,
    "colour": colour,
    "shape": shape,
    "position": position,
    "relation": relation,
    "reading": reading,
    "detail": detail,
    "two facts": two_facts,
}
