"""The `vtprune` command. Subcommands are entry points, because some are in packages that depend on this one."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from vllm_vtprune import __version__
from vllm_vtprune.plugin.version import UntestedVllmError

GROUP = "vtprune.commands"
QUIET = 3.0  # seconds
DEMO_MODULES = ("httpx", "httpx_sse", "jinja2", "matplotlib", "scipy", "skimage", "sklearn")
"""What the extra `demo` installs."""
DESCRIPTION = """Serve vision-language models with fewer visual tokens.

commands:
  serve [MODEL] [options]   an OpenAI-compatible server (takes every option of `vllm serve`)
  demo [options]            one question about a picture, without and with pruning
  inspect IMAGE [options]   draw which visual tokens of an image a policy keeps
  eval [options]            compare the accuracy of methods on scenes with known answers
  calibrate [options]       find a preset for your own images
  bench [MODEL] [options]   what presets do to the speed and the answers of your model

example:
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-default balanced
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        argv: arguments after the program's name; None: the process's arguments.
    """
    arguments = sys.argv[1:] if argv is None else argv
    commands = entry_points(group=GROUP)
    parser = argparse.ArgumentParser(
        prog="vtprune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"vllm-vtprune {__version__}")
    parser.add_argument("command", choices=sorted(commands.names), metavar="COMMAND", help="see above")
    command = parser.parse_args(arguments[:1]).command
    try:
        with waiting(f"Loading vtprune {command}"):
            run = commands[command].load()
        run(arguments[1:])
    except UntestedVllmError as error:
        sys.exit(f"vtprune {command}: {error}")
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in DEMO_MODULES:
            raise
        sys.exit(f"vtprune {command} needs {module}: pip install 'vllm-vtprune[demo]'")
    except KeyboardInterrupt:
        print(f"\nvtprune {command}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def waiting(what: str, over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Say every few seconds what the context waits for: the import of vLLM and torch may take ten seconds and more.

    Args:
        what: what is done.
        over: whether it is done although the context goes on.
    """
    left = threading.Event()

    def say() -> None:
        started = time.monotonic()
        while not left.wait(QUIET) and not over():
            print(f"{what} ... {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        left.set()


if __name__ == "__main__":
    main()
