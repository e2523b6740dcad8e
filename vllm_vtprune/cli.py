"""The `vtprune` command."""

from __future__ import annotations

import argparse
import sys

from vllm_vtprune import __version__

COMMANDS = ("serve", "demo", "inspect", "eval", "calibrate")
DESCRIPTION = """Serve vision-language models with fewer visual tokens.

commands:
  serve [MODEL] [options]   an OpenAI-compatible server (takes every option of `vllm serve`)
  demo [options]            one photograph, asked about without and with pruning
  inspect IMAGE [options]   which parts of a picture a policy keeps, drawn on it
  eval [options]            how many answers stay right under every way of pruning
  calibrate [options]       a preset for one's own images

example:
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-default balanced
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        argv: arguments after the program's name; None for those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="vtprune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vllm-vtprune {__version__}")
    parser.add_argument(
        "command", choices=["serve", "demo", "inspect", "eval", "calibrate"], metavar="COMMAND", help="see above"
    )
    command = parser.parse_args(arguments[:1]).command
    if command == "serve":
        from server.launch import serve

        serve(arguments[1:])
    elif command == "inspect":
        from vllm_vtprune.inspection import inspect

        inspect(arguments[1:])
    elif command == "eval":
        from evaluation.command import evaluate

        evaluate(arguments[1:])
    elif command == "calibrate":
        from evaluation.calibrate import calibrate

        calibrate(arguments[1:])
    else:
        from vllm_vtprune.demo.command import demo

        demo(arguments[1:])


if __name__ == "__main__":
    main()
