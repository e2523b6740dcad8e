"""Weighted pivots: which rows of a matrix a pivoted Cholesky factorisation of its Gram matrix takes, in order.

Greedy residual energy (ResPrune) and the greedy map of a determinantal point process (CDPruner) are this recurrence:
with ``G = V V^T``, ``c = (G[:, i] - L L[i]^T) / sqrt(e_i)`` and ``e -= c^2``. Taken step by step it is bound by memory,
as each of the ``k`` steps reads ``V`` or the factor once, and on a GPU by the host, which has to see each pick. So the
picks are drafted and checked, in panels:

1. scores only fall, so the next picks are almost always among the tokens with the best scores now: draft them within
   the small Gram matrix of those;
2. compute the columns of the whole draft by matrix products;
3. follow the scores of all tokens through the draft, and accept its picks as far as they are the best of all.

The picks are those of the step-by-step form. Products are in float32, and decisions in float64. What tokens share (real
ones share most of their energy) would drown in rounding what tells them apart: so after the first few picks their part
is computed again in float64, and later picks enter the products without it. Where they share nearly all of it, that
happens after the first pick already.

A CPU and a GPU run the same code, but for the draft: on a GPU one kernel makes it
(:mod:`~vllm_vtprune.selectors.pivots_triton`), and the host is asked a few times for each panel. In float64 are single
numbers for each token, panels, and a few tokens at once, never all tokens or a matrix of tokens by tokens:
:func:`peak_bytes` says what that needs.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.lazy import Tensor, torch

SPANNED = 1e-5  # residual, as a share of the token's own energy, that may be rounding of a float32 product
NEGLIGIBLE = 1e-12  # the same, as a share of the largest token's energy
LEAST_PANEL = 48  # picks drafted at once; a tenth of all where that is more, so that V is read ten times
MOST_PANEL = 256  # but no more than these, as a panel holds float64 numbers for each token and pick
GPU_PANEL = 64
CANDIDATES = 2  # tokens among which a panel is drafted, as a multiple of its picks

FIRST_PANEL = 16
HEAD = 8  # picks, at least, whose directions hold what the tokens share
NEARLY_ALL = 0.99  # share of all energy on the first direction, from which on the next picks cannot wait for that
CHUNK = 128  # tokens turned to float64 at once
GPU_CHUNK = 1024

PANEL_COPIES = 6  # float64 numbers for each token and pick of a panel, at one time
TOKEN_VECTORS = 16  # float64 numbers for each token, at one time

Floats = NDArray[np.float64]


def weighted_pivots(tokens: Tensor, energy: Tensor, gate: Tensor, seed: int, k: int) -> Tensor:
    """The ``(k,)`` pivots, in order: ``seed``, then each time the argmax of residual energy times gate.

    A token whose residual energy is down to rounding is spanned by those chosen. Once all are, the rest follows by
    gate. All ties go to the smallest index.

    Args:
        tokens: ``V (N, d)`` in float32.
        energy: ``(N,)`` squared lengths of the tokens, in float64.
        gate: ``(N,)`` in float64, above 0 and at most 1.
        seed: the first pivot.
        k: how many, ``1..N``.
    """
    return _Factorisation(tokens, energy, gate, spanned_below(energy), k).run(seed)


def peak_bytes(n: int, d: int, k: int) -> int:
    """The most memory that ``k`` picks of ``n`` tokens of width ``d`` take on a GPU, the tokens in float32 included."""
    tokens, factor = 4 * n * d, 4 * n * min(k, d)
    panel = (4 + 8 * PANEL_COPIES) * n * min(GPU_PANEL, k)
    chunk = 8 * d * (min(GPU_CHUNK, n) + 4 * HEAD) + 8 * min(GPU_CHUNK, n) * 4 * HEAD
    draft = min(CANDIDATES * GPU_PANEL, n)
    return tokens + factor + max(panel, chunk) + 4 * d * draft + 8 * 4 * draft * draft + 8 * TOKEN_VECTORS * n


def spanned_below(energy: Tensor) -> Tensor:
    """Residual energies ``(N,)`` up to which a token of ``energy (N,)`` counts as spanned by those chosen."""
    return torch.maximum(energy * SPANNED, energy.max() * NEGLIGIBLE)


class _Factorisation:
    """A factorisation under way: the rows of the factor, and what is left of every token."""

    def __init__(self, tokens: Tensor, energy: Tensor, gate: Tensor, spanned: Tensor, k: int) -> None:
        self.tokens, self.gate, self.spanned, self.k = tokens, gate, spanned, k
        self.on_cpu = tokens.device.type == "cpu"
        # row j: every token's coefficient on the j-th direction, of which there are no more than tokens are wide
        self.factor = tokens.new_empty(min(k, tokens.shape[1]), len(tokens))
        self.directions = 0
        self.head = tokens.new_empty(0, tokens.shape[1], dtype=torch.float64)  # (h, d) the first directions themselves
        self.sharpen_at = HEAD  # directions
        self.residual = energy.clone()
        self.late = -1 / gate  # score of a spanned token: below every other, since those are positive
        self.order = torch.empty(0, dtype=torch.long, device=tokens.device)
        self.pivots = self.order  # those of `order` that brought a direction

    def run(self, seed: int) -> Tensor:
        energy, pick = self.residual, seed
        while len(self.order) < self.k:
            room = min(self.k - len(self.order), len(self.factor) - self.directions)
            if room and self.residual[pick] > self.spanned[pick]:
                candidates = self._candidates(pick, CANDIDATES * self._panel())
                self._accept(self._draft(candidates, pick, min(self._panel(), room)))
                if self.directions >= self.sharpen_at:
                    self._sharpen(energy)
            elif not len(self.order):  # a seed that is next to zero
                self._take(torch.tensor([pick], device=self.order.device))
            else:
                rest = self.late.sort(descending=True, stable=True).indices
                self.order = torch.cat([self.order, rest[: self.k - len(self.order)]])
            pick = int(self._scores(self.residual).argmax())
        return self.order

    def _panel(self) -> int:
        """How many picks to draft."""
        if len(self.head) < HEAD:
            return FIRST_PANEL
        return min(max(LEAST_PANEL, self.k // 10), MOST_PANEL) if self.on_cpu else GPU_PANEL

    def _scores(self, residual: Tensor) -> Tensor:
        """Scores ``(N,)`` at residuals ``(N,)``, or ``(b, N)`` at ``(b, N)``."""
        return torch.where(residual > self.spanned, residual * self.gate, self.late)

    def _take(self, picks: Tensor) -> None:
        self.order = torch.cat([self.order, picks])
        self.residual.index_fill_(0, picks, 0.0)
        self.late.index_fill_(0, picks, -torch.inf)

    def _candidates(self, pick: int, count: int) -> Tensor:
        """The tokens with the best scores, ``pick`` among them, ascending."""
        scores = self._scores(self.residual)
        scores[pick] = torch.inf  # a seed may have any score
        return scores.topk(min(count, len(scores))).indices.sort().values

    def _draft(self, candidates: Tensor, pick: int, count: int) -> Tensor:
        """The next picks, at most ``count``, if none but the candidates could be picked."""
        tokens = self.tokens.index_select(0, candidates)
        shared, known = self.factor[: self.directions].index_select(1, candidates).tensor_split([len(self.head)])
        tokens = torch.addmm(tokens, shared.T, self.head.to(tokens.dtype), alpha=-1)
        gram = torch.addmm(tokens @ tokens.T, known.T, known, alpha=-1).double()
        residual, gate, spanned = self.residual[candidates], self.gate[candidates], self.spanned[candidates]
        place = (candidates == pick).nonzero()[0]
        if self.on_cpu:
            steps = _steps(gram.numpy(), residual.numpy(), gate.numpy(), spanned.numpy(), int(place), count)
            return candidates[steps]
        from vllm_vtprune.selectors.pivots_triton import draft  # Triton comes with torch's GPU builds

        return candidates[draft(gram, residual, gate, spanned, place, count)]

    def _accept(self, draft: Tensor) -> None:
        """Factorise by the draft, as far as its picks are what the scores of all tokens ask for."""
        picked, known = self.tokens.index_select(0, draft), self.factor[len(self.head) : self.directions]
        if len(self.head):
            exact = picked.double()
            picked = (exact - exact @ self.head.T @ self.head).to(picked.dtype)
        columns = picked @ self.tokens.T
        columns = columns.addmm_(known.index_select(1, draft).T, known, alpha=-1).double()  # (b, N)
        corner = columns[:, draft]
        corner.diagonal().copy_(self.residual[draft])  # where the products cancel most
        lower, failed_at = torch.linalg.cholesky_ex(corner)
        usable = int(failed_at) - 1 if failed_at else len(draft)
        rows = torch.linalg.solve_triangular(lower[:usable, :usable], columns[:usable], upper=False)
        residual = rows.square().cumsum_(dim=0).neg_().add_(self.residual)  # (b, N): after each pick
        draft = draft[:usable]
        scores = self._scores(residual)
        place = torch.arange(usable, device=draft.device)
        chosen = place[:, None] >= place[None, :]  # (after pick, pick)
        scores[:, draft] = scores[:, draft].masked_fill(chosen, -torch.inf)
        agrees = scores[:-1].argmax(dim=1) == draft[1:]
        accepted = 1 + int(agrees.cumprod(dim=0).sum())
        if self.directions == 0 and residual[0].sum() < (1 - NEARLY_ALL) * self.residual.sum():
            accepted = self.sharpen_at = 1
        self.factor[self.directions : self.directions + accepted] = rows[:accepted]
        self.directions += accepted
        self.pivots = torch.cat([self.pivots, draft[:accepted]])
        self.residual = residual[accepted - 1].clone()
        self._take(draft[:accepted])

    def _sharpen(self, energy: Tensor) -> None:
        """Compute anew, in float64, the first directions, every token's coefficients on them, and what they leave."""
        rows = self.tokens[self.pivots].double()
        self.head = torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.T), rows, upper=False)
        size = CHUNK if self.on_cpu else GPU_CHUNK
        exact = rows.new_empty(min(size, len(self.tokens)), self.tokens.shape[1])  # fresh memory is slow
        for first in range(0, len(self.tokens), size):
            chunk = self.tokens[first : first + size]
            coefficients = self.head @ exact[: len(chunk)].copy_(chunk).T
            self.factor[: len(self.head), first : first + size] = coefficients
            self.residual[first : first + size] = energy[first : first + size] - coefficients.square().sum(dim=0)
        self.residual.index_fill_(0, self.order, 0.0)
        self.sharpen_at = HEAD if len(self.head) < HEAD else self.k + 1  # not again


def _steps(gram: Floats, residual: Floats, gate: Floats, spanned: Floats, pick: int, count: int) -> list[int]:
    """At most ``count`` steps of the recurrence, from ``pick``, until what is left is spanned.

    ``gram (m, m)`` is what is left of the Gram matrix of ``m`` tokens; the other arrays are ``(m,)``.
    """
    rows = np.empty((count, len(gram)))
    residual = residual.copy()
    order: list[int] = []
    for step in range(count):
        order.append(pick)
        row = rows[step]
        np.matmul(rows[:step, pick], rows[:step], out=row)
        np.subtract(gram[pick], row, out=row)
        row /= np.sqrt(residual[pick])
        residual -= row * row
        residual[pick] = 0.0
        pick = int(np.argmax(np.where(residual > spanned, residual * gate, 0.0)))
        if residual[pick] <= spanned[pick]:
            break
    return order
