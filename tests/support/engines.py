"""A real vLLM engine on a tiny checkpoint, and what a test asks it."""

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
from PIL import Image
from prometheus_client import REGISTRY
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)
from vllm.envs import disable_envs_cache

from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.runtime import PruningRuntime

ROOT = Path(__file__).resolve().parents[2]

TOLERANCE = 1e-3
"""Of a log-probability: the same computation in another order of additions."""

BLOCK = 32
"""Tokens of a KV-cache block, the least that the CPU kernels take: the prefix cache works in whole blocks."""

KV_CACHE_BYTES = 2**28
"""Of each engine: several run at the same time."""

MODEL_RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",  # its kernels, for which vLLM wants a backend of Triton
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(ROOT / "tests/support/triton_on_cpu"), os.environ.get("PYTHONPATH")))
        ),
    },
}
"""The environment of an engine with each of vLLM's model runners. V2 is vLLM's default where Triton runs."""


def ask_about(question: str, images: int = 1, before: str = "") -> str:
    """A prompt in the checkpoint's chat format."""
    return f"{before}USER: " + "<image>\n" * images + f"{question} ASSISTANT:"


@dataclass(frozen=True)
class Ask:
    """One request. `pruning` is the value of the key; None leaves the key out."""

    prompt: str
    images: Sequence[Image.Image | Tensor | None] = ()
    pruning: object = None
    uuids: Sequence[str | None] | None = None
    max_tokens: int = 8
    videos: Sequence[Any] = ()
    processor_kwargs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]
    """Of the best tokens of each step, and of the one taken."""
    prefix_hits: int
    """Prompt tokens whose keys and values were at hand."""
    images: list[ImageReport] | None = field(default=None)
    plans: list[Any] = field(default_factory=list)
    """What a producer would send."""


class Engine:
    """An LLM and the way to its report of each request."""

    def __init__(self, llm: LLM, environment: Mapping[str, str]) -> None:
        self.llm = llm
        self._environment = environment
        self.processor = llm.llm_engine.renderer.get_mm_processor()
        # Not above: workers of stock engines import this module.
        from vllm_vtprune.plugin.processor import PruningProcessor
        from vllm_vtprune.plugin.request import REPORT_KEY

        if isinstance(self.processor, PruningProcessor):
            self.select_in("api")

        apply = self.processor.apply
        self._reports: list[RequestReport | None] = []

        def recording(*arguments: Any, **named: Any) -> Any:
            result = apply(*arguments, **named)
            self._reports.append(result.get(REPORT_KEY))
            return result

        self.processor.apply = recording

    def select_in(self, choice: Literal["auto", "api", "engine"]) -> None:
        """From now on, select tokens there, as with VTPRUNE_PLACEMENT; the API process, until this is called."""
        from vllm_vtprune.plugin.placement import EnginePlacement

        config = self.llm.llm_engine.vllm_config
        with variables(self._environment):  # which tells the model runner
            self.processor.engine_placement = EnginePlacement.of(choice, config.model_config, config)

    @property
    def model_runner(self) -> str:
        """Which of MODEL_RUNNERS its worker, an `ObservedWorker`, really has."""
        [worker] = self.llm.collective_rpc("worker_state")
        modules = {"vllm.v1.worker.cpu_model_runner": "V1", "vllm.v1.worker.cpu.model_runner": "V2"}
        return modules[worker["model_runner"]]

    @property
    def runtime(self) -> PruningRuntime:
        return self.processor.runtime

    def ask(self, request: Ask) -> Answer:
        return self.ask_together([request])[0]

    def ask_together(self, requests: Sequence[Ask]) -> list[Answer]:
        """Give the engine all requests at once."""
        prompts, params = [], []
        for request in requests:
            prompt: dict[str, Any] = {"prompt": request.prompt}
            media = {"image": list(request.images), "video": list(request.videos)}
            if any(media.values()):
                prompt["multi_modal_data"] = {modality: items for modality, items in media.items() if items}
            if request.uuids is not None:
                prompt["multi_modal_uuids"] = {"image": list(request.uuids)}
            processor_kwargs = dict(request.processor_kwargs)
            if request.pruning is not None:
                processor_kwargs["pruning"] = request.pruning
            if processor_kwargs:
                prompt["mm_processor_kwargs"] = processor_kwargs
            prompts.append(prompt)
            params.append(SamplingParams(temperature=0, max_tokens=request.max_tokens, logprobs=5, ignore_eos=True))
        self._reports.clear()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        reports = iter(self._reports)
        return [
            self._answer(output, next(reports) if request.images or request.videos else None, request.pruning)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _answer(self, output: Any, report: RequestReport | None, pruning: object) -> Answer:
        completion = output.outputs[0]
        return Answer(
            prompt_ids=list(output.prompt_token_ids),
            token_ids=list(completion.token_ids),
            logprobs=[{token: entry.logprob for token, entry in step.items()} for step in completion.logprobs],
            prefix_hits=output.num_cached_tokens,
            images=report.images if report is not None and pruning is not False else None,
            plans=[] if report is None else report.plans,
        )

    def encodings(self) -> int:
        """Images that the vision encoder of this engine's frontend has encoded so far, by its metrics."""
        sample = {"model_name": self.runtime.model_name}
        return int(REGISTRY.get_sample_value("vtprune:feature_cache_misses_total", sample) or 0)

    def forget_prompts(self) -> None:
        """Empty vLLM's processor, encoder and prefix caches."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache()


@contextmanager
def variables(environment: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, for this process and for those that it starts meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        if "PYTHONPATH" in environment:  # of which processes that are spawned see nothing: they get this one's path
            patch.setattr(sys, "path", [*environment["PYTHONPATH"].split(os.pathsep), *sys.path])
        yield


def join_world() -> None:
    """Have the groups of a world of one, for every engine and encoder of this process, whatever their models.

    vLLM makes them with its first engine, and those of a model without experts are too few for one with.
    """
    if not model_parallel_is_initialized():
        with TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)


@contextmanager
def running_engine(
    checkpoint: Path, name: str, environment: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Engine]:
    """Start an engine whose metrics are labelled `name`, and stop it.

    Its core and its worker run in this process: others would have to import vLLM anew. An executor that is asked for
    has both in processes of their own, Triton's interpreter the worker: kernels are made for it as they are imported.

    Args:
        environment: variables that are set while the engine starts.
        options: of `LLM`, beside or instead of those that all engines of the tests share.
    """
    shared = {
        "dtype": "float32",
        "max_model_len": 2560,
        "limit_mm_per_prompt": {"image": 3},
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "worker_extension_cls": "tests.support.processes.ObservedWorker",
    }
    environment = {"HF_HUB_OFFLINE": "1", **(environment or {})}
    core_in_process = "distributed_executor_backend" not in options
    worker_in_process = core_in_process and "TRITON_INTERPRET" not in environment
    join_world()
    gc.freeze()  # vLLM collects garbage six times as it starts: half a second each if modules are looked through
    if core_in_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        shared["distributed_executor_backend"] = "uni" if worker_in_process else "mp"
    with variables(environment), pytest.MonkeyPatch.context() as patch:
        if "TRITON_INTERPRET" in environment:  # vLLM was imported without
            patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        if worker_in_process:  # which loads the model's class anyway; vLLM would inspect it in another process first
            patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
        llm = LLM(
            model=str(checkpoint),
            served_model_name=name,
            enforce_eager=True,
            max_num_seqs=8,
            block_size=BLOCK,
            **(shared | options),
        )
    disable_envs_cache()  # for what starts next in this process
    try:
        yield Engine(llm, environment)
    finally:
        with pytest.MonkeyPatch.context() as patch:
            if core_in_process:  # other engines of this process go on using vLLM's groups
                patch.setattr("vllm.v1.engine.core.cleanup_dist_env_and_memory", lambda: None)
            llm.llm_engine.engine_core.shutdown(timeout=1)  # then by force: its interpreters take 10 s to clean up
        del llm
        gc.unfreeze()
        gc.collect()


def assert_same(answer: Answer, expected: Answer) -> float:
    """Same prompt, tokens, log-probabilities and reports but for caches and placement. Returns the worst difference."""
    assert answer.prompt_ids == expected.prompt_ids
    assert answer.token_ids == expected.token_ids
    assert uncached(answer.images) == uncached(expected.images)
    return worst_difference(answer.logprobs, expected.logprobs)


def reports(answer: Answer) -> list[ImageReport]:
    assert answer.images is not None
    return answer.images


def uncached(images: list[ImageReport] | None) -> list[ImageReport] | None:
    if images is None:
        return None
    return [replace(image, cached=False, placement=None, placement_reason=None) for image in images]


def worst_difference(got: Sequence[Mapping[int, float]], expected: Sequence[Mapping[int, float]]) -> float:
    """The largest difference between the log-probabilities of the tokens that both list, checked against TOLERANCE."""
    assert len(got) == len(expected)
    differences = [
        abs(step[token] - other[token])
        for step, other in zip(got, expected, strict=True)
        for token in step.keys() & other
    ]
    assert len(differences) >= len(got), "each step's own token, at least, is in both"
    worst = max(differences)
    assert worst < TOLERANCE
    return worst


def worst(answer: Answer, logprobs: Tensor) -> float:
    """The largest difference from the reference's log-probabilities (T, vocabulary)."""
    differences = [
        abs(float(row[token]) - value)
        for step, row in zip(answer.logprobs, logprobs, strict=True)
        for token, value in step.items()
    ]
    assert len(differences) >= 5 * len(answer.token_ids)
    return max(differences)
