"""Stock vLLM and this project's server, with the same model and options."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_vtprune_server.process import STOCK_COMMAND, running_server

MODEL = "model"
OPTIONS = (
    "--served-model-name", MODEL, "--load-format", "dummy", "--enforce-eager", "--disable-uvicorn-access-log",
)  # fmt: skip
"""Options of every compared server: random weights, one model name."""
STOCK = "stock"


@dataclass(frozen=True)
class Arm:
    """A server and the policy that it is asked with.

    Attributes:
        name: as on the command line: ``stock``, or POLICY or POLICY@PLACEMENT for our server.
        placement: ``--pruning-placement`` of our server; None: stock vLLM.
        pruning: policy sent with each request, as JSON or the name of a preset; None: none is sent.
    """

    name: str
    placement: str | None = None
    pruning: str | None = None

    @classmethod
    def parse(cls, name: str) -> Arm:
        """An arm by its name. POLICY is a preset, or the share of tokens to keep.

        Raises:
            argparse.ArgumentTypeError: unknown placement, or a share outside of (0, 1].
        """
        if name == STOCK:
            return cls(name)
        policy, _, placement = name.partition("@")
        if placement not in ("", "auto", "api", "engine"):
            raise argparse.ArgumentTypeError(f"unknown placement {placement!r}; expected auto, api or engine")
        if re.fullmatch(r"[0-9.]+", policy):
            try:
                share = float(policy)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise argparse.ArgumentTypeError(
                    f"cannot keep a share of {policy}; expected a number above 0, at most 1"
                )
            policy = json.dumps({"budget": {"type": "ratio", "keep": share}})
        return cls(name, placement or "auto", policy)

    @property
    def prunes(self) -> bool:
        """Whether its policy is to drop tokens."""
        return self.pruning not in (None, "off")

    @property
    def locust_options(self) -> tuple[str, ...]:
        """What Locust sends its policy with."""
        return () if self.pruning is None else ("--pruning", self.pruning)


def server(model: Path, options: Sequence[str], *, stock: bool, kv_cache_gb: int = 1) -> AbstractContextManager[str]:
    """Run stock vLLM or our server with a checkpoint; yields its URL.

    Args:
        model: folder of the checkpoint.
        options: vLLM's options besides `OPTIONS`.
        stock: run without our plugin.
        kv_cache_gb: KV cache on a CPU, in GiB.
    """
    options = [*OPTIONS, *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb), "HF_HUB_OFFLINE": "1"}
    if stock:
        environment["VLLM_PLUGINS"] = ""
        return running_server(["--model", str(model), *options], command=STOCK_COMMAND, environment=environment)
    return running_server([str(model), *options], environment=environment)


@contextmanager
def servers(model: Path, options: Sequence[str], arms: Sequence[Arm]) -> Iterator[dict[str, str]]:
    """Run the servers of these arms at the same time, one for each placement; yields the URL for each arm's name."""
    with ExitStack() as stack:
        urls = {}
        for placement in dict.fromkeys(arm.placement for arm in arms):
            extra = [] if placement is None else ["--pruning-placement", placement]
            urls[placement] = stack.enter_context(server(model, [*options, *extra], stock=placement is None))
        yield {arm.name: urls[arm.placement] for arm in arms}
