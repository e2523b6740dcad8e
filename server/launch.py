"""`vtprune serve`: vLLM's `serve` with the pruning plugin enabled and checked."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from vllm_vtprune.cli import waiting
from vllm_vtprune.families import ARCHITECTURES
from vllm_vtprune.plugin.version import require_tested_vllm
from vllm_vtprune.policy import BUILTIN_PRESETS, PolicyError, PruningPolicy
from vllm_vtprune.presets import PresetsError, PresetsFile, read_presets
from vllm_vtprune_checkpoints import embedded_checkpoint
from vllm_vtprune_server.policies import Policies

if TYPE_CHECKING:
    from vllm.config import ModelConfig

PLUGIN = "vtprune"
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.endpoint_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
EMBEDDED_NAME = "vtprune-demo"
SHUTDOWN_TIMEOUT = 20
"""Seconds for running requests to finish after SIGTERM; vLLM's default is 0. Kubernetes kills after 30."""

VLLM_OPTIONS: dict[str, dict[str, Any]] = {
    "--host": {"default": ""},
    "--port": {"type": int, "default": 8000},
    "--headless": {"action": "store_true", "dest": "no_port"},
    "--uds": {"dest": "no_port"},
    "--config": {"dest": "no_port"},
}
"""Options of `vllm serve` that tell which port is used; with a config file that is not known early."""

EXAMPLES = f"""examples:
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-default balanced
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-default '{{"budget": {{"type": "tokens", "keep": 128}}}}'
  vtprune serve llava-hf/llava-1.5-7b-hf --pruning-presets presets.toml --pruning-default thumbnail
  vtprune serve          # the demo model, served as {EMBEDDED_NAME}

more help:
  vtprune serve --help=Pruning         the options of pruning
  vtprune serve --help=ModelConfig     any group above
  vtprune serve --help=max-model-len   one option
  vtprune serve --help=all             all options
"""


def serve(argv: list[str]) -> None:
    """Run the server until it is stopped.

    Args:
        argv: the command line after ``vtprune serve``.

    Raises:
        SystemExit: 2 for invalid options; 1 for a model or server that would not prune, or if the engine died.
    """
    require_tested_vllm()
    check_early(argv)
    enable_plugin()
    with waiting("Loading vLLM"):
        args, model_config = prepare(argv)
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from vllm_vtprune_server import memory
    from vllm_vtprune_server.encoders import running_encoders

    signal.signal(signal.SIGINT, end_start)  # until the server answers, which has vLLM's handler
    try:
        with running_encoders(args, model_config), saying_that_it_starts(args):
            ServeSubcommand().cmd(args)
    except Exception:
        problem = memory.cpu_memory_problem(args, margin=memory.GROWTH)
        if not problem:
            raise
        traceback.print_exc()
        sys.exit(f"vtprune serve: {problem}")

    from vllm_vtprune_server.shutdown import engine_died

    if engine_died.is_set():
        sys.exit("vtprune serve: the engine died; see its last log lines above")


def prepare(argv: list[str]) -> tuple[argparse.Namespace, ModelConfig]:
    """Import vLLM, read the command line, and check what can be checked before the engine starts.

    Returns:
        The options, and the config of the model.

    Raises:
        SystemExit: as for `serve`.
    """
    refuse_without_routes()
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune_server import memory

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as `vllm serve` does
    parser = FlexibleArgumentParser(prog="vtprune")
    command = ServeSubcommand()
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = (
        "vtprune serve [MODEL] [options of `vllm serve`] [--pruning-default POLICY] [--pruning-presets FILE]"
    )
    serve_parser.description = "Serve a vision-language model whose visual tokens are pruned before prefill."
    serve_parser.epilog = EXAMPLES
    add_pruning_options(serve_parser)
    serve_parser.set_defaults(shutdown_timeout=SHUTDOWN_TIMEOUT, enable_offline_docs=None)
    memory.mark_defaults(serve_parser)
    args = parser.parse_args(["serve", *argv])
    options = {argument.split("=", 1)[0] for argument in argv}
    if args.model_tag is None and not options & {"--model", "--config"}:
        args = parser.parse_args(["serve", *_with_model(argv)])
    if "pruning_placement" in args:  # maybe from a config file
        os.environ["VTPRUNE_PLACEMENT"] = args.pruning_placement
    if args.enable_offline_docs is None:
        args.enable_offline_docs = docs_work_offline(args)
    try:
        policies = Policies.of_options(args, args.kv_transfer_config)
    except PolicyError as error:
        serve_parser.error(str(error))
    command.validate(args)
    refuse_other_front_ends(args)
    os.environ.setdefault("VTPRUNE_LOAD_FORMAT", str(args.load_format))
    if args.download_dir is not None:
        os.environ.setdefault("VTPRUNE_DOWNLOAD_DIR", str(args.download_dir))
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", PLUGIN)  # server/media.py
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    refuse_missing_folder(args.model)
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    refuse_unpruned(model_config, policies.default)
    memory.limit_embedded_kv_cache(args)
    if problem := memory.cpu_memory_problem(args):
        sys.exit(f"vtprune serve: {problem}")
    memory.reserve_gpu_memory(args, model_config)
    memory.unmark_defaults(args)
    return args, model_config


def saying_that_it_starts(args: argparse.Namespace) -> AbstractContextManager[None]:
    """On a terminal, say every few seconds that the server starts, until it answers: vLLM is silent meanwhile."""
    if not sys.stderr.isatty() or args.headless or args.uds or not args.port:
        return nullcontext()
    host = args.host if args.host and args.host not in ("0.0.0.0", "::") else "localhost"

    def listens() -> bool:
        with suppress(OSError), socket.create_connection((host, args.port), timeout=1):
            return True
        return False

    return waiting("Starting the server", over=listens)


def end_start(number: int, frame: FrameType | None) -> None:
    """End a server that starts, with all its processes, at once.

    vLLM 0.32.0 waits for its engine first, which may take minutes (v1/engine/utils.py, ``wait_for_engine_startup``).
    """
    print("\nvtprune serve: interrupted", file=sys.stderr, flush=True)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):  # it frees what the others leave, then ends
                child.kill()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def add_pruning_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vtprune serve` that `vllm serve` does not have."""
    group = parser.add_argument_group("Pruning", "Which visual tokens are dropped before prefill.")
    group.add_argument(
        "--pruning-default",
        type=policy_argument,
        default="false",
        metavar="POLICY",
        help="Policy of requests that set none: a preset "
        f"({', '.join(BUILTIN_PRESETS)}, or one of --pruning-presets), a JSON object, or false.",
    )
    group.add_argument(
        "--pruning-presets",
        type=presets_argument,
        metavar="FILE",
        help="File of presets, TOML or (.json) JSON: one policy per name. "
        "A name of a built-in preset replaces that preset.",
    )
    group.add_argument(
        "--pruning-detail",
        action="store_true",
        help="Let OpenAI's detail of an image choose its policy: low (fast), high (quality), original (off); auto "
        "leaves the choice to the request and --pruning-default. A table [detail] in the file of --pruning-presets "
        "replaces these. Without the option, detail has no effect.",
    )
    group.add_argument(
        "--pruning-placement",
        choices=("auto", "api", "engine"),
        default=argparse.SUPPRESS,
        metavar="PLACEMENT",
        help="Where tokens are selected: auto, api or engine. engine: in the engine's encoder step, for budgets in "
        "tokens or as a ratio; other policies are refused, and API processes hold no vision encoder. api: in the API "
        "process. auto (default): in the engine where it can follow the policy. Also VTPRUNE_PLACEMENT.",
    )
    group.add_argument(
        "--pruning-playground",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Serve a page at / that shows two policies side by side: kept tokens, answers and times.",
    )


def check_early(argv: list[str]) -> None:
    """Judge the pruning options and the port before vLLM is imported, which takes half a minute; set the placement.

    Raises:
        SystemExit: 2 for an invalid pruning option, 1 if the port is in use.
    """
    if {argument.split("=", 1)[0] for argument in argv} & {"-h", "--help"}:
        return
    parser = argparse.ArgumentParser(
        prog="vtprune serve", usage="vtprune serve --help", add_help=False, allow_abbrev=False
    )
    add_pruning_options(parser)
    for name, options in VLLM_OPTIONS.items():
        parser.add_argument(name, **options)
    args, _ = parser.parse_known_args(argv)
    if "pruning_placement" in args:
        os.environ["VTPRUNE_PLACEMENT"] = args.pruning_placement
    try:
        Policies.of_options(args)
    except (PolicyError, ValueError) as error:
        parser.error(str(error))
    if not args.no_port and args.port:
        refuse_used_port(args.host, args.port)


def docs_work_offline(args: argparse.Namespace) -> bool:
    """Whether ``/docs`` can use the files that vLLM brings: they know no root path."""
    return not (args.disable_fastapi_docs or args.root_path)


def refuse_used_port(host: str, port: int) -> None:
    """Exit if something listens on a port."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"vtprune serve: port {port} is in use; set --port to another")


def enable_plugin() -> None:
    """Name our plugin in ``VLLM_PLUGINS`` without disabling others.

    vLLM loads endpoint plugins only if they are named there; once set, the variable filters plugins of all groups.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is None:
        names = [point.name for group in PLUGIN_GROUPS for point in entry_points(group=group)]
    else:
        names = named.split(",")
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*filter(None, names), PLUGIN]))


def policy_argument(text: str) -> object:
    """Parse a policy from the command line: JSON, else a preset's name. Validated later, when all presets are known."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def presets_argument(text: str) -> PresetsFile:
    """Read a file of presets.

    Raises:
        argparse.ArgumentTypeError: names the file and, if applicable, preset and field.
    """
    try:
        return read_presets(Path(text))
    except PresetsError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def refuse_without_routes() -> None:
    """Exit unless our routes load.

    vLLM only logs an endpoint plugin that fails to load; its own routes would then serve and ignore ``pruning``.
    """
    try:
        plugins = [point.load() for point in entry_points(group="vllm.endpoint_plugins", name=PLUGIN)]
    except Exception as error:
        sys.exit(f"vtprune serve: the server's routes cannot be loaded: {type(error).__name__}: {error}")
    if not plugins:
        sys.exit("vtprune serve: the server's routes are not installed; reinstall vllm-vtprune")


def refuse_other_front_ends(args: argparse.Namespace) -> None:
    """Exit if vLLM's front end is one that loads no endpoint plugins and so ignores ``pruning``."""
    from vllm import envs

    front_ends = {"--grpc": args.grpc, "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND}
    for name, is_set in front_ends.items():
        if is_set:
            sys.exit(f"vtprune serve: {name} cannot be combined with pruning: its front end ignores the pruning field.")


def refuse_unpruned(model_config: ModelConfig, default: PruningPolicy) -> None:
    """Exit if the model should be pruned and would not be.

    vLLM only logs a plugin that fails to load; the model would then be served unpruned. A model that cannot be pruned
    is served with a warning, unless the default policy prunes.
    """
    from vllm.model_executor.model_loader import get_model_architecture

    from vllm_vtprune.plugin.model import PrunedModel

    model_class, architecture = get_model_architecture(model_config)
    if issubclass(model_class, PrunedModel):
        return
    if architecture in ARCHITECTURES:
        sys.exit(
            f"vtprune serve: {model_config.model} would be served unpruned: its architecture {architecture} resolves "
            f"to {model_class.__module__}:{model_class.__qualname__}, expected {ARCHITECTURES[architecture]}. Is "
            "another plugin registering it, or did vtprune fail to load (see above)?"
        )
    unpruned = f"{model_config.model} has the architecture {architecture}, which cannot be pruned"
    known = ", ".join(ARCHITECTURES)
    if default.enabled:
        sys.exit(f"vtprune serve: {unpruned}, but --pruning-default asks for it; expected one of {known}.")
    print(f"vtprune serve: {unpruned}: it is served UNPRUNED. To prune, serve one of {known}.", file=sys.stderr)


def _with_model(argv: list[str]) -> list[str]:
    """Add the embedded checkpoint and the playground, for arguments that name no model.

    On CPUs the model runs in float32, because bfloat16 is many times slower on CPUs without native support.
    """
    from vllm.platforms import current_platform

    options = {argument.split("=", 1)[0] for argument in argv if argument.startswith("-")}
    named = options & {"--served-model-name", "--served_model_name"}
    name = [] if named else ["--served-model-name", EMBEDDED_NAME]
    dtype = ["--dtype", "float32"] if current_platform.is_cpu() and "--dtype" not in options else []
    return [str(embedded_checkpoint()), *name, *dtype, "--pruning-playground", *argv]


def refuse_missing_folder(model: str) -> None:
    """Exit if a model is written as a path, and there is nothing; vLLM would look for it on the hub."""
    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().exists():
        sys.exit(f"vtprune serve: {model}: no such folder; expected a model's folder, or a name on the hub")
