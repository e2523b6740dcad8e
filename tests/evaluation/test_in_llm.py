"""Pruning inside the language model against plain transformers and against masks over the whole sequence."""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support.energy import energy_rank
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.policy import EnergyBudget, PruningPolicy, RatioBudget, TokensBudget
from vllm_vtprune_checkpoints.llava import IMAGE_TOKEN_ID, llava_tokenizer, save_llava_checkpoint
from vllm_vtprune_checkpoints.writing import random_weight
from vllm_vtprune_evaluation.in_llm import VTW, AdaptPrune, FastV, InLLM, Pruning, PyramidDrop, adaptprune
from vllm_vtprune_evaluation.in_llm.driver import Reading
from vllm_vtprune_evaluation.in_llm.pruning import Entrance

GRID = 6
N = GRID * GRID
LAYERS = 5  # not a multiple of 4: the parts of the pyramid differ
QUESTION = "What is beside the red bus?"
STEPS = 5


def image(seed: int = 0) -> Image.Image:
    """Noise at two scales, so that patches differ in what they show."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (3, 3, 3)).repeat(28, axis=0).repeat(28, axis=1)
    return Image.fromarray((coarse + random.integers(0, 56, coarse.shape)).astype(np.uint8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer heads of keys than of queries, and an end that no answer reaches."""
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            image_size=14 * GRID,
            patch_size=14,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=48,
        ),
        text_config=LlamaConfig(
            vocab_size=2048,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=IMAGE_TOKEN_ID["tiny"] + 1,
        ),
        image_token_index=IMAGE_TOKEN_ID["tiny"],
        image_seq_length=N,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
    )
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict({name: random_weight(name, tuple(w.shape), 3) for name, w in model.state_dict().items()})
    return save_llava_checkpoint(tmp_path_factory.mktemp("llava"), model, llava_tokenizer(), dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> InLLM:
    return InLLM(checkpoint)


def methods(keep: int) -> list[Pruning]:
    budget = TokensBudget(keep=keep)
    return [FastV(budget), FastV(budget, after=1), PyramidDrop(budget), VTW(budget), AdaptPrune(budget)]


# What each method below is compared with: it sees the attention and the keys of the full sequence.
PRUNED: list[Pruning] = [
    FastV(TokensBudget(keep=7)),
    FastV(TokensBudget(keep=20), after=4),
    FastV(RatioBudget(keep=0.2), after=1),
    FastV(EnergyBudget(threshold=0.9, min_tokens=1)),
    PyramidDrop(),
    PyramidDrop(TokensBudget(keep=15)),
    PyramidDrop(EnergyBudget(threshold=0.97, min_tokens=1)),
    VTW(TokensBudget(keep=20)),
    VTW(EnergyBudget(threshold=0.9, min_tokens=1)),
    AdaptPrune(TokensBudget(keep=9)),
    AdaptPrune(EnergyBudget(threshold=0.9, min_tokens=1), after=3),
]


# --- nothing leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", [None, *methods(N), *methods(N + 1)], ids=str)
def test_with_every_token_kept_it_is_plain_transformers(model: InLLM, pruning: Pruning | None) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = model.processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = model.processor(images=image(), text=text, return_tensors="pt")
    plain = model.model.generate(
        **inputs, do_sample=False, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True
    )
    new = plain.sequences[0, inputs["input_ids"].shape[1] :]
    assert len(new) == STEPS, "the model stopped early: nothing to compare"
    answer = model.answer(image(), QUESTION, pruning, max_tokens=STEPS)
    assert answer.text == model.processor.tokenizer.decode(new)
    assert answer.tokens == N
    reading = model.prefill(model.prompt(image(), QUESTION), pruning)
    for token, logits in zip(new, plain.logits, strict=True):
        torch.testing.assert_close(reading.logits, logits[0], rtol=1e-4, atol=1e-4)
        model.extend(reading, int(token))


# --- the full sequence, with tokens hidden from layers --------------------------------------------------------------


@dataclass
class Masked:
    """The language model over a whole sequence, in which a layer may be told not to see some visual tokens."""

    model: InLLM
    ids: Tensor
    embeds: Tensor
    last: int  # row of the prompt's last token
    start: int
    weights: list[Tensor] = field(default_factory=list)

    @property
    def layers(self) -> Any:
        return self.model.model.model.language_model.layers

    def run(self, index: int, hidden: Tensor, hide: list[int]) -> tuple[Tensor, Tensor]:
        """What layer `index` gives, and its attention from the prompt's last token to each visual token."""
        length = hidden.shape[1]
        mask = torch.zeros(length, length)
        mask[torch.ones(length, length).triu(1).bool()] = -torch.inf
        for token in hide:
            row = self.start + token
            mask[row + 1 :, row] = -torch.inf
        seen: list[Tensor] = []
        hook = self.layers[index].self_attn.register_forward_hook(lambda *call: seen.append(call[2][1]))
        rotary = self.model.model.model.language_model.rotary_emb(hidden, torch.arange(length)[None])
        out = self.layers[index](hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        hook.remove()
        return out, seen[0][0, :, self.last, self.start : self.start + N].mean(0)

    def keys(self, index: int, hidden: Tensor) -> Tensor:
        layer = self.layers[index]
        normed = layer.input_layernorm(hidden)[0, self.start : self.start + N]
        return normed @ layer.self_attn.k_proj.weight.T

    def logits(self, pruning: Pruning, counts: list[int]) -> tuple[Tensor, list[list[int]]]:
        """(rows, vocabulary) from the prompt's last token on, and the visual tokens that each layer saw."""
        hidden, left, kept = self.embeds[None], list(range(N)), []
        attention = torch.zeros(N)
        for index, count in enumerate(counts):
            if count < len(left):
                if isinstance(pruning, PyramidDrop):
                    attention = self.run(index, hidden, [i for i in range(N) if i not in left])[1]
                if isinstance(pruning, AdaptPrune):
                    left = suppressed(attention.tolist(), self.keys(index, hidden), count)
                else:
                    left = sorted(left, key=lambda i: -float(attention[i]))[:count]
            hidden, attention = self.run(index, hidden, [i for i in range(N) if i not in left])
            kept.append(sorted(left))
        llama = self.model.model.model.language_model
        return self.model.model.lm_head(llama.norm(hidden[0, self.last :])), kept


def suppressed(scores: list[float], keys: Tensor, count: int) -> list[int]:
    """AdaptPrune's Algorithm 1, one token at a time."""
    constants: Any = adaptprune.POLICY.chosen
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    places = [(i // GRID, i % GRID) for i in range(N)]
    from_centre = [[2 * x / (GRID - 1) - 1 for x in place] for place in places]
    weight = [math.exp(-(y * y + x * x) / 2) for y, x in from_centre]
    left = {i: scores[i] * weight[i] / max(weight) for i in range(N)}
    chosen: list[int] = []
    while len(chosen) < count:
        pick = max(left, key=lambda i: left[i])
        del left[pick]
        chosen.append(pick)
        for other in left:
            distance = math.dist(places[pick], places[other])
            if distance <= constants.radius:
                near = math.exp(-(distance**2) / (2 * constants.sigma_d**2))
                cosine = float(unit[pick] @ unit[other])
                alike = math.exp(-((1 - cosine) ** 2) / (2 * constants.sigma_s**2))
                left[other] *= 1 - near * alike
    return chosen


def read(model: InLLM, pruning: Pruning, picture: Image.Image) -> tuple[list[int], list[Tensor], Reading]:
    """Greedy tokens, the logits that each came from, and the reading after them."""
    reading = model.prefill(model.prompt(picture, QUESTION), pruning)
    tokens, logits = [], []
    for _ in range(STEPS):
        logits.append(reading.logits)
        tokens.append(int(reading.logits.argmax()))
        model.extend(reading, tokens[-1])
    return tokens, [*logits, reading.logits], reading


@pytest.mark.parametrize("pruning", PRUNED, ids=str)
@torch.no_grad()
def test_a_token_that_left_is_one_that_later_layers_do_not_see(model: InLLM, pruning: Pruning) -> None:
    prompt = model.prompt(image(1), QUESTION)
    tokens, logits, reading = read(model, pruning, image(1))
    counts = pruning.schedule(prompt.features, LAYERS)
    assert min(counts) < N, "nothing leaves: nothing to compare"
    table = model.model.get_input_embeddings()
    for step in range(STEPS + 1):  # each time from scratch
        ids = torch.cat([prompt.ids, torch.tensor(tokens[:step], dtype=torch.long)])
        embeds = torch.cat([prompt.embeds, table(ids[len(prompt.ids) :])])
        masked = Masked(model, ids, embeds, len(prompt.ids) - 1, prompt.start)
        expected, kept = masked.logits(pruning, counts)
        assert [left.tolist() for left in reading.kept] == kept, "other tokens left than the slow form chose"
        torch.testing.assert_close(logits[step], expected[-1], rtol=1e-4, atol=1e-4)
    assert reading.tokens == sum(counts) / LAYERS
    answer = model.answer(image(1), QUESTION, pruning, max_tokens=STEPS)
    assert (answer.text, answer.tokens) == (model.processor.tokenizer.decode(tokens), sum(counts) / LAYERS)


@torch.no_grad()
def test_tokens_with_similar_keys_suppress_each_other(model: InLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens are kept than with the published constant, under which random keys are never similar."""
    prompt, pruning = model.prompt(image(1), QUESTION), AdaptPrune(TokensBudget(keep=15))
    published = model.prefill(prompt, pruning).kept[-1].tolist()
    constants = {"importance": "cls", "sigma_d": 1.5, "sigma_s": 0.5, "radius": 5.0}
    monkeypatch.setattr(adaptprune, "POLICY", PruningPolicy.parse({"method": "adaptprune", **constants}))
    counts = pruning.schedule(prompt.features, LAYERS)
    masked = Masked(model, prompt.ids, prompt.embeds, len(prompt.ids) - 1, prompt.start)
    _, kept = masked.logits(pruning, counts)
    assert [left.tolist() for left in model.prefill(prompt, pruning).kept] == kept
    assert kept[-1] != published


@pytest.mark.parametrize("pruning", PRUNED, ids=str)
def test_each_layer_caches_what_entered_it(model: InLLM, pruning: Pruning) -> None:
    text = len(model.prompt(image(1), QUESTION).ids) - N
    _, _, reading = read(model, pruning, image(1))
    counts = pruning.schedule(model.features(image(1)), LAYERS)
    assert [layer.keys.shape[2] for layer in reading.cache.layers] == [count + text + STEPS for count in counts]
    assert reading.position == text + N + STEPS, "positions continue those of the whole prompt"


# --- what ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Pruning):
    """Another method, whose looks at the model are kept."""

    method: Pruning
    look: Callable[[Entrance], Tensor]
    seen: list[Tensor] = field(default_factory=list)

    def schedule(self, features: VisualFeatures, layers: int) -> list[int]:
        return self.method.schedule(features, layers)

    def choose(self, entrance: Entrance, count: int) -> Tensor:
        self.seen.append(self.look(entrance))
        return self.method.choose(entrance, count)


@pytest.mark.parametrize(
    ("method", "look", "layer"),
    [
        (FastV(TokensBudget(keep=5)), "attention_before", 1),
        (FastV(TokensBudget(keep=5), after=4), "attention_before", 3),
        (AdaptPrune(TokensBudget(keep=5)), "attention_before", 1),
        (PyramidDrop(TokensBudget(keep=12)), "attention_here", 1),
    ],
    ids=str,
)
def test_what_ranks_is_the_attention_that_transformers_shows(
    model: InLLM, method: Pruning, look: str, layer: int
) -> None:
    watched = Watched(method, operator.attrgetter(look))
    prompt = model.prompt(image(2), QUESTION)
    reading = model.prefill(prompt, watched)
    pixels = model.processor.image_processor(image(2), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        shown = model.model(input_ids=prompt.ids[None], pixel_values=pixels, output_attentions=True).attentions
    expected = shown[layer][0, :, -1, prompt.start : prompt.start + N].mean(0)
    torch.testing.assert_close(watched.seen[0], expected, rtol=1e-4, atol=1e-7)
    if not isinstance(method, AdaptPrune):
        first = next(left for left in reading.kept if len(left) < N)
        assert set(first.tolist()) == set(expected.topk(len(first)).indices.tolist())


def test_the_keys_are_those_of_the_next_layer_before_rotation(model: InLLM) -> None:
    watched = Watched(AdaptPrune(TokensBudget(keep=5)), operator.attrgetter("keys"))
    prompt = model.prompt(image(2), QUESTION)
    seen: list[Tensor] = []
    hook = model.model.model.language_model.layers[2].self_attn.k_proj.register_forward_hook(
        lambda *call: seen.append(call[2])
    )
    model.prefill(prompt)
    hook.remove()
    model.prefill(prompt, watched)
    expected = seen[0][0, prompt.start : prompt.start + N]
    torch.testing.assert_close(watched.seen[0], expected, rtol=1e-4, atol=1e-5)


# --- how many stay --------------------------------------------------------------------------------------------------


def features(n: int = 576) -> VisualFeatures:
    rows = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 64)
    return VisualFeatures(encoder=rows, embeds=rows)


def test_schedules_of_the_papers() -> None:
    full = [576]
    keep = TokensBudget(keep=64)
    assert FastV(keep).schedule(features(), 32) == full * 2 + [64] * 30
    assert AdaptPrune(keep).schedule(features(), 32) == full * 2 + [64] * 30
    assert PyramidDrop().schedule(features(), 32) == full * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert VTW(keep).schedule(features(), 32) == full * 4 + [0] * 28
    assert VTW(TokensBudget(keep=1)).schedule(features(), 32) == full + [0] * 31
    assert VTW(TokensBudget(keep=234)).schedule(features(), 4) == full * 2 + [0] * 2  # 1.625 layers
    assert VTW(TokensBudget(keep=216)).schedule(features(), 4) == full * 2 + [0] * 2  # 1.5 layers
    assert VTW(TokensBudget(keep=215)).schedule(features(), 4) == full + [0] * 3


@pytest.mark.parametrize("layers", [4, 5, 6, 7, 28, 32])
def test_the_pyramid_is_scaled_to_the_mean(layers: int) -> None:
    paper = PyramidDrop().schedule(features(), layers)
    first = paper.count(576)
    assert first == math.floor(layers / 4 + 0.5)
    for k in range(math.ceil(576 * first / layers), 577):
        counts = PyramidDrop(TokensBudget(keep=k)).schedule(features(), layers)
        assert len(counts) == layers
        assert counts == sorted(counts, reverse=True)
        assert counts[:first] == [576] * first
        assert min(counts) >= 1
        # whole tokens in the last part cannot come nearer; where it is down to one token, it cannot give back
        nearest = Fraction(paper.count(72), 2) if min(counts) > 1 else layers
        assert abs(sum(counts) - k * layers) <= nearest, f"{counts}: mean {sum(counts) / layers}, not {k}"
        second, third, last = sorted(set(counts), reverse=True)[1:] if len(set(counts)) == 4 else (0, 0, 0)
        if last > 1:
            assert abs(second - 4 * last) < 5, f"{counts}: not 4 to 2 to 1"
            assert abs(third - 2 * last) < 5, f"{counts}: not 4 to 2 to 1"


def test_the_papers_fractions_are_those_at_their_own_mean() -> None:
    assert PyramidDrop(TokensBudget(keep=270)).schedule(features(), 32) == PyramidDrop().schedule(features(), 32)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_plus_e_takes_k_from_the_energy_of_the_picture(model: InLLM, threshold: float) -> None:
    budget = EnergyBudget(threshold=threshold, min_tokens=1)
    seen = set()
    for seed in range(3):
        read_by_hand = model.model.model.vision_tower(
            model.processor.image_processor(image(seed), return_tensors="pt")["pixel_values"],
            output_hidden_states=True,
        )
        encoder = read_by_hand.hidden_states[-2][0, 1:].detach()
        k = energy_rank(encoder, threshold, "exact")
        seen.add(k)
        fixed = TokensBudget(keep=k)
        picture = model.features(image(seed))
        torch.testing.assert_close(picture.encoder, encoder)
        assert FastV(budget).schedule(picture, LAYERS) == [N, N, k, k, k]
        assert AdaptPrune(budget, after=1).schedule(picture, LAYERS) == [N, k, k, k, k]
        assert VTW(budget).schedule(picture, LAYERS) == VTW(fixed).schedule(picture, LAYERS)
        scheduled = PyramidDrop(budget).schedule(picture, LAYERS)
        if k * LAYERS >= N:
            assert scheduled == PyramidDrop(fixed).schedule(picture, LAYERS)
        else:
            assert scheduled == [N, 1, 1, 1, 1], "an energy budget is raised to what the pyramid can reach"
    assert max(seen) < N


# --- around it ------------------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_once(model: InLLM) -> None:
    passes: list[object] = []
    hook = model.model.model.vision_tower.register_forward_hook(lambda *call: passes.append(call))
    pruning = FastV(TokensBudget(keep=9))
    first = model.answer(image(7), QUESTION, pruning)
    for question in ("Where is it?", QUESTION):
        again = model.answer(image(7), question, pruning)
    assert len(passes) == 1
    assert again == first
    changed = image(7)
    changed.putpixel((3, 3), (255, 0, 0))
    model.answer(changed, QUESTION, pruning)
    assert len(passes) == 2, "a picture that changed is another one"
    hook.remove()


@pytest.fixture
def ends(model: InLLM) -> Iterator[set[int]]:
    """The tokens that end an answer, for a test to change."""
    before = set(model.ends)
    yield model.ends
    model.ends.clear()
    model.ends.update(before)


def test_the_end_token_ends_the_answer_and_is_not_in_it(model: InLLM, ends: set[int]) -> None:
    tokens, _, _ = read(model, FastV(TokensBudget(keep=9)), image())
    until = tokens.index(tokens[2])
    ends.add(tokens[2])
    answer = model.answer(image(), QUESTION, FastV(TokensBudget(keep=9)), max_tokens=STEPS)
    assert answer.text == model.processor.tokenizer.decode(tokens[:until])


def test_special_tokens_can_be_left_to_the_template(checkpoint: Path, model: InLLM) -> None:
    without = InLLM(checkpoint, add_special_tokens=False).prompt(image(), QUESTION)
    assert model.prompt(image(), QUESTION).ids.tolist() == [1, *without.ids.tolist()]


def test_what_a_pyramid_cannot_reach_is_said() -> None:
    with pytest.raises(ValueError, match="must have at least 4 layers, one for each part of the pyramid, got 3"):
        PyramidDrop().schedule(features(), 3)
    with pytest.raises(ValueError, match=r"budget must keep at least 144 of 576 tokens, because .*, got 143 from"):
        PyramidDrop(TokensBudget(keep=143)).schedule(features(), 4)


def test_what_cannot_be_asked_is_said(model: InLLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"question must be a text without the image token, got 'an <image>'"):
        model.answer(image(), "an <image>")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"checkpoint must be of the types llava and llama, got \['llama', None\]"):
        InLLM(tmp_path)
