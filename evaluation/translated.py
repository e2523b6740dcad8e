"""Whether to look at every word of a question in another language, or at no text: answers under either, compared.

    python -m vllm_vtprune_evaluation.translated --questions 1000 --keep 64 36

The model in the package knows no language but English, so the choice of tokens looks at a translation while the
question is asked in English. What this shows is whether words that the model does not know do harm. "unrelated" are
English words that have nothing to do with the picture. Of each arm: accuracy, and how many questions are answered
rightly that are not without text, and the other way round.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping
from statistics import fmean

from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.policy import PruningPolicy
from vllm_vtprune.text import read_prompt
from vllm_vtprune_evaluation.arms import Arm, fixed
from vllm_vtprune_evaluation.offline import Offline
from vllm_vtprune_evaluation.options import count, embedded_model
from vllm_vtprune_evaluation.progress import Progress
from vllm_vtprune_evaluation.questions import pictures
from vllm_vtprune_evaluation.tables import markdown, percent

UNRELATED = "sofa tractor lemonade umbrella guitar giraffe window bicycle airport sandwich".split()
LANGUAGES = ("es", "de", "zh")
_WORDS = """
red rojo rot 红色; orange naranja orange 橙色; yellow amarillo gelb 黄色; green verde grün 绿色; blue azul blau 蓝色;
purple morado lila 紫色; white blanco weiß 白色; black negro schwarz 黑色; circle círculo Kreis 圆形;
square cuadrado Quadrat 正方形; triangle triángulo Dreieck 三角形; star estrella Stern 星形; cross cruz Kreuz 十字;
diamond rombo Raute 菱形; handwritten manuscrito handgeschriebene 手写的; word palabra Wort 单词;
number número Zahl 数字; shape forma Form 形状"""
_PLURALS = dict(zip(LANGUAGES, ("s", "e", ""), strict=True))
_QUESTIONS = """
Is there a {} but no {}?|¿Hay un {} pero ningún {}?|Gibt es ein {}, aber kein {}?|有没有{}但没有{}？
Is there a {} and a {}?|¿Hay un {} y un {}?|Gibt es ein {} und ein {}?|有没有{}和{}？
Is there a {}?|¿Hay un {}?|Gibt es ein {}?|有没有{}？
Is the {} left of the {}?|¿Está el {} a la izquierda del {}?|Ist das {} links von dem {}?|{}在{}的左边吗？
Is the {} right of the {}?|¿Está el {} a la derecha del {}?|Ist das {} rechts von dem {}?|{}在{}的右边吗？
Is the {} above the {}?|¿Está el {} encima del {}?|Ist das {} über dem {}?|{}在{}的上面吗？
Is the {} below the {}?|¿Está el {} debajo del {}?|Ist das {} unter dem {}?|{}在{}的下面吗？
How many {} are there?|¿Cuántos {} hay?|Wie viele {} gibt es?|有多少个{}？
What color is the dot on the {}?|¿De qué color es el punto en el {}?|Welche Farbe hat der Punkt auf dem {}?|\
{}上的圆点是什么颜色？
What color is the shape with a {} dot?|¿De qué color es la forma con un punto {}?|\
Welche Farbe hat die Form mit {} Punkt?|带{}圆点的形状是什么颜色？
What color is the {}?|¿De qué color es el {}?|Welche Farbe hat das {}?|{}是什么颜色？
Which shape is {}?|¿Qué forma es {}?|Welche Form ist {}?|哪个形状是{}？
Which shape has a {} dot?|¿Qué forma tiene un punto {}?|Welche Form hat einen {} Punkt?|哪个形状有{}圆点？
Where is the {}?|¿Dónde está el {}?|Wo ist das {}?|{}在哪里？
Which {} digit is handwritten?|¿Qué dígito {} está escrito a mano?|Welche {} Ziffer ist handgeschrieben?|\
哪个{}数字是手写的？
Which {} is there?|¿Qué {} hay?|Welches {} gibt es?|有什么{}？"""
"""In English, then in each of `LANGUAGES`; the first that fits counts."""


def translate(question: str, language: str) -> str:
    """A question about a scene in another language, without regard to gender and case."""
    for line in _QUESTIONS.strip().split("\n"):
        english, *others = line.split("|")
        match = re.fullmatch(re.escape(english).replace(r"a\ \{\}", r"an?\ (.+)").replace(r"\{\}", "(.+)"), question)
        if match:
            phrases = [_phrase(phrase, language) for phrase in match.groups()]
            return others[LANGUAGES.index(language)].format(*phrases)
    raise ValueError(f"no translation is known of {question!r}")


def _phrase(phrase: str, language: str) -> str:
    words = {}
    for english, *others in map(str.split, _WORDS.split(";")):
        words[english] = others[LANGUAGES.index(language)]
        words["crosses" if english == "cross" else f"{english}s"] = words[english] + _PLURALS[language]
    translated = [word if word.isdigit() else words[word] for word in phrase.split()]
    return ("" if language == "zh" else " ").join(reversed(translated) if language == "es" else translated)


class Translated(Offline):
    """Chooses tokens by the text that the policy's query names, and asks in English."""

    def _nouns(self, policy: PruningPolicy, question: str) -> tuple[int, ...]:
        if policy.text.query in LANGUAGES:
            words = read_prompt(translate(question, policy.text.query)).nouns
        elif policy.text.query == "unrelated":
            words = tuple(random.Random(question).sample(UNRELATED, 3))
        else:
            return super()._nouns(policy, question)
        return tuple(token for word in words for token in noun_ids(word, self._tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.translated",
        description="Choose tokens by a question's translation, and ask it in English.",
    )
    parser.add_argument("--questions", type=count, default=1000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--keep", type=count, nargs="+", default=[64, 36], metavar="K", help="tokens of a picture")
    args = parser.parse_args()
    texts: dict[str, Mapping[str, str]] = {"no text": {"query": ""}, "English nouns": {}}
    texts |= {name: {"query": name} for name in ("unrelated", *LANGUAGES)}
    arms = [
        Arm(name, {"budget": fixed(keep), "text": text}, name, keep)
        for keep in args.keep
        for name, text in texts.items()
    ]
    right: list[dict[str, bool]] = [{} for _ in arms]
    model = Translated(embedded_model())
    for picture in Progress(list(pictures("validation", args.questions)), desc="encoded", unit="pictures"):
        pending = [(number, range(len(picture.questions))) for number in range(len(arms))]
        for batch in model.answers(picture, arms, pending):
            for number, answer in batch:
                right[number][answer.question] = answer.right
    rows = []
    for number, arm in enumerate(arms):
        with_text, without = right[number], right[number - number % len(texts)]
        won = sum(with_text[question] and not without[question] for question in with_text)
        lost = sum(without[question] and not with_text[question] for question in with_text)
        rows.append((str(arm.keep), arm.name, percent(fmean(with_text.values())), str(won), str(lost)))
    print(markdown(("tokens", "text", "right", "won", "lost"), rows))


if __name__ == "__main__":
    main()
