"""`vtprune demo`: one picture on a real server, asked about without and with pruning."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_vtprune.kept import KeptTokens
from vllm_vtprune.overlay import draw_kept, enlarged, side_by_side, with_caption
from vllm_vtprune_checkpoints import DEFAULT, RANDOM_WEIGHTS, weights_of
from vllm_vtprune_evaluation import tables
from vllm_vtprune_evaluation.inspection import require_writable
from vllm_vtprune_evaluation.messages import data_url, message
from vllm_vtprune_evaluation.options import SERVE_OPTIONS, add_family_argument, model_of
from vllm_vtprune_evaluation.photo import photograph
from vllm_vtprune_server.process import ServerFailed, announced_server

PHOTOGRAPH_QUESTION = "What is the astronaut wearing, and what is behind her?"
SCENE, SCENE_KIND = 43, "detail"  # of the test split, which training never saw
POLICY = {"method": "resprune", "budget": {"type": "energy", "threshold": 0.99}}
ARMS: dict[str, object] = {"unpruned": False, "pruned": POLICY}

FILE = Path("vtprune-demo.png")

SMALL_KV_CACHE = ("--kv-cache-memory-bytes", str(2**30))  # of a small model; two short requests need no more

EXAMPLE = """example:
  vtprune demo --json | tail -n 1 | python -m json.tool
"""


def demo(argv: list[str]) -> None:
    """Run the demo.

    Raises:
        SystemExit: 1 if the server does not start or a request fails, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="vtprune demo",
        description="Start a server, ask one question about a picture without and with pruning, and stop the server.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    add_family_argument(parser)
    parser.add_argument("--model", help="serve this model instead")
    parser.add_argument("--question", help="question (default: one about the picture)")
    parser.add_argument(
        "--out",
        type=Path,
        default=FILE,
        metavar="FILE",
        help="image to write: the picture, and the tokens that were kept (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    require_writable(parser, args.out)

    from openai import OpenAIError

    weights = weights_of(args.model, args.family)
    trained = weights == "trained"
    subject = scene() if trained else Subject(photograph(), PHOTOGRAPH_QUESTION)
    if args.question:
        subject = Subject(subject.picture, args.question)
    try:
        result = run(subject, _arguments(args))
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", file=sys.stderr)
        sys.exit(130)
    except (ServerFailed, OpenAIError) as error:
        sys.exit(f"vtprune demo: {error}")
    draw(subject, result["pruned"]).save(args.out)
    if args.json:
        asked = {"question": subject.question, "right_answer": subject.answer, "weights": weights}
        print(json.dumps({**asked, **result}))
        return
    if weights == "random":
        print(RANDOM_WEIGHTS)
    print(f"{subject}\n{table(result)}\nThe picture and the tokens that were kept: {args.out}")
    print("To try your own pictures, run `vtprune serve` and open http://localhost:8000/")


@dataclass(frozen=True)
class Subject:
    """A picture and what is asked about it; `answer` is the right one, where it is known."""

    picture: Image.Image
    question: str
    answer: str | None = None

    def __str__(self) -> str:
        return self.question if self.answer is None else f"{self.question} (Right is: {self.answer})"


def scene() -> Subject:
    """One of the scenes that the demo model is made for, on a photograph."""
    from vllm_vtprune_evaluation.scenes import ask as questions_about
    from vllm_vtprune_evaluation.scenes import make_scene, paint

    picture = make_scene("test", SCENE)
    [question] = questions_about(picture, kinds=[SCENE_KIND])
    return Subject(paint(picture), question.text, question.answer)


def draw(subject: Subject, outcome: Mapping[str, Any]) -> Image.Image:
    """The picture beside the tokens of it that were kept; the picture alone if their positions are not known.

    Args:
        subject: what was asked about.
        outcome: of an arm, as from `run`.
    """
    [image] = outcome["pruning"]["images"]
    picture = with_caption(enlarged(subject.picture), subject.question)
    kept = None if image["kept"] is None else KeptTokens.read(image["kept"])
    if kept is None or not (kept.grid or kept.tiles):
        return picture
    caption = f"{image['kept_tokens']} of {image['visual_tokens']} tokens: {_shortened(outcome['answer'])}"
    return side_by_side([picture, with_caption(enlarged(draw_kept(subject.picture, kept)), caption)])


def run(subject: Subject, arguments: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Ask a server of our own about the picture, once for each of `ARMS`.

    Args:
        subject: what is asked about.
        arguments: of `vtprune serve`, its model first; without one, it serves the demo model.

    Returns:
        For each arm ``ttft_ms`` (milliseconds from sending the request to the first token, seen by the client),
        ``answer`` and ``pruning``, the server's report.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "the demo model"
    with announced_server(name, [*arguments, "--max-model-len", "4096", *SERVE_OPTIONS]) as url:
        print(f"Serving on {url}. Warming up ...", file=sys.stderr)
        for policy in ARMS.values():
            ask(url, Image.new("RGB", (336, 336), "gray"), subject.question, policy)
        return {arm: ask(url, subject.picture, subject.question, policy) for arm, policy in ARMS.items()}


def _arguments(args: argparse.Namespace) -> list[str]:
    """The model and options of the server; without a model, it serves the demo model."""
    model, brings_code = model_of(args)
    named = [model] if args.model or args.family != DEFAULT else []
    return [*named, *(["--trust-remote-code"] if brings_code else []), *([] if args.model else SMALL_KV_CACHE)]


def ask(url: str, image: Image.Image, question: str, policy: object) -> dict[str, Any]:
    """One streamed chat completion about an image, through the OpenAI client."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
    messages: list[Any] = [message(question, [data_url(image)])]
    model = client.models.list().data[0].id
    ttft: float | None = None
    answer, report = "", None
    started = time.perf_counter()
    stream: Iterable[Any] = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=16,
        temperature=0,
        stream=True,
        extra_body={"pruning": {**policy, "return_kept": True} if isinstance(policy, Mapping) else policy},
    )
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            ttft = time.perf_counter() - started if ttft is None else ttft
            answer += text
        report = (chunk.model_extra or {}).get("pruning", report)
    return {"ttft_ms": None if ttft is None else round(ttft * 1000, 1), "answer": answer.strip(), "pruning": report}


def table(result: dict[str, dict[str, Any]]) -> str:
    """The result for people: one line for each arm."""
    rows = [("", "visual tokens", "kept", "budget", "energy", "first token", "answer")]
    for arm, outcome in result.items():
        report = outcome["pruning"]
        image = report["images"][0]
        budget = report["budget"]
        rows.append(
            (
                arm,
                str(image["visual_tokens"]),
                str(image["kept_tokens"]),
                "-" if budget is None else f"{budget['type']} {budget.get('threshold', budget.get('keep', ''))}",
                "-" if image["energy"] is None else f"{image['energy']:.4f}",
                "-" if outcome["ttft_ms"] is None else f"{outcome['ttft_ms']:.0f} ms",
                _shortened(outcome["answer"]),
            )
        )
    return tables.table(rows[0], rows[1:], texts=len(rows[0]))


def _shortened(text: str, length: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
