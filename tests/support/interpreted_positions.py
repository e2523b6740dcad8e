"""A command: positions as Model Runner V2 works them out, against those by hand. Run it with ``TRITON_INTERPRET=1``.

    python -m tests.support.interpreted_positions CHECKPOINT

vLLM's CPU build switches Triton off; here its kernels run in Triton's interpreter. Prompts are read in chunks smaller
than an image, several requests in each step, and each then decodes some tokens. Items that lie in the prefix cache have
lost what a runner does not need.
"""

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
import vllm.triton_utils
import vllm.utils.platform_utils

# Before the kernels are defined, and the buffers that a CPU does not have.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
vllm.utils.platform_utils.is_uva_available = lambda: False

from vllm.multimodal.utils import strip_covered_mm_data  # noqa: E402
from vllm.v1.worker.gpu.mm.rope import RopeState  # noqa: E402

from tests.support.qwen2_5_vl_requests import requests_to  # noqa: E402
from tests.support.videos import video  # noqa: E402

CHUNK = 40
DECODED = 5


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def main(checkpoint: str) -> None:
    reference, model, requests = requests_to(Path(checkpoint), video())
    states = RopeState(num_dims=3, max_num_reqs=8, max_num_tokens=256, max_model_len=4096, device=torch.device("cpu"))
    slots = [5, 0, 3, 7, 2][: len(requests)]
    lengths = [len(request.prompt_ids) for request in requests]
    covered = [0, lengths[1] - 10, 0, 32, lengths[4] // 2]  # of each prompt, what is in the prefix cache
    stripped = 0
    for request, slot, computed in zip(requests, slots, covered, strict=True):
        features = strip_covered_mm_data(request.features, computed, uses_mrope=True)
        stripped += sum(
            set(before.data) != set(after.data)
            for before, after in zip(request.features, features, strict=True)
            if before.data is not None and after.data is not None
        )
        states.init_prefill_positions(slot, model, request.prompt_ids, features)
    assert stripped >= 1, "no item lay in the prefix cache"
    states.apply_staged_writes()

    expected = [reference.positions(request.prompt_ids, request.media, DECODED) for request in requests]
    prefill_lengths = ints([0] * 8)
    prefill_lengths[slots] = ints(lengths)
    computed = ints([0] * 8)
    computed[slots] = ints(covered)
    checked = 0
    while True:
        active, takes = [], []
        for slot, length in zip(slots, lengths, strict=True):
            done = int(computed[slot])
            if done < length:
                takes.append(min(CHUNK, length - done))
            elif done < length + DECODED:
                takes.append(1)
            else:
                continue
            active.append(slot)
        if not active:
            break
        starts = [0, *torch.tensor(takes).cumsum(0).tolist()]
        states.prepare_positions(ints(active), ints(starts), prefill_lengths, computed)
        positions = states.get_positions(starts[-1])
        for index, slot in enumerate(active):
            done = int(computed[slot])
            wanted = expected[slots.index(slot)][:, done : done + takes[index]]
            assert positions[:, starts[index] : starts[index + 1]].tolist() == wanted.tolist(), (slot, done)
            checked += takes[index]
            computed[slot] += takes[index]
    print(f"{checked} positions agree, {stripped} items stripped")


if __name__ == "__main__":
    main(sys.argv[1])
