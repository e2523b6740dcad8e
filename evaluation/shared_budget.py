"""What one budget for all images of a request does to answers: a picture beside a blank page.

    python -m vllm_vtprune_evaluation.shared_budget --questions 600 --out build/shared-budget

Ask the demo model, on a server, about pictures of the test split that follow a blank page: unpruned, and at each budget
of `KEEPS`, as many tokens for either image or twice as many for both (``scope`` "request"). Print the tokens that the
picture keeps, the right answers, and their difference on the same questions, with a 95 % interval over pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from vllm_vtprune_evaluation.answers import Answers, subject
from vllm_vtprune_evaluation.arms import UNPRUNED, Arm, fixed
from vllm_vtprune_evaluation.asking import ask_all
from vllm_vtprune_evaluation.messages import data_url
from vllm_vtprune_evaluation.options import count, embedded_model, make_folder, served
from vllm_vtprune_evaluation.questions import pictures
from vllm_vtprune_evaluation.results import differences, results
from vllm_vtprune_evaluation.tables import markdown, percent

KEEPS = (20, 40, 80)  # tokens of each image
DTYPE = "float32"
BLANK = Image.new("RGB", (336, 336), "white")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.shared_budget",
        description="Answers about a picture beside a blank page, with a budget for each and one for both.",
    )
    parser.add_argument("--questions", type=count, default=600, metavar="N", help="questions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/shared-budget"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    make_folder(args.out, "--out")
    asked, model = list(pictures("test", args.questions)), embedded_model()
    each = [Arm(f"{keep} for each image", {"budget": fixed(keep)}, "image", keep) for keep in KEEPS]
    shared = [
        Arm(f"{2 * keep} for both", {"budget": {**fixed(2 * keep), "scope": "request"}}, "request", keep)
        for keep in KEEPS
    ]
    arms = [UNPRUNED, *each, *shared]
    with Answers(args.out / "answers.jsonl", subject(model, f"{DTYPE}, beside a blank page", asked)) as answers:
        with served(None, model, DTYPE) as url:
            ask_all(url, model, asked, arms, answers, first=data_url(BLANK))
        answered = [(arm, answers.of(arm)) for arm in arms]
    unpruned = answered[0][1]
    by_name = {result.arm: result for result in results(answered, unpruned)}
    pairs = [(by_name[both.name], by_name[alone.name]) for both, alone in zip(shared, each, strict=True)]
    gained = {difference.arm: difference for difference in differences(pairs, answered, unpruned)}
    rows = []
    for arm in arms:
        result, difference = by_name[arm.name], gained.get(arm.name)
        points = (
            ""
            if difference is None
            else "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * value for value in (difference.difference, *difference.ci95))
            )
        )
        rows.append([arm.name, f"{result.mean_tokens:.1f}", percent(result.accuracy), points])
    print(
        markdown(["budget", "tokens of the picture", f"right of {len(unpruned)}", "points more than equal parts"], rows)
    )


if __name__ == "__main__":
    main()
