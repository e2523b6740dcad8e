"""Weighted pivots: which rows of a matrix a pivoted Cholesky factorisation of its Gram matrix takes, in order.

Greedy residual energy (ResPrune) and the greedy map of a determinantal point process (CDPruner) are this recurrence:
take the token with the best residual energy times gate, and remove its direction from all tokens. Done pick by pick,
each step reads all tokens, and a GPU waits for the host. So picks are made in panels:

1. scores only fall, so the next picks are almost always among the tokens with the best scores now: run the recurrence
   on the small Gram matrix of those (:func:`_steps`, on the host);
2. follow the scores of all tokens through these picks, and accept them as far as each is the best of all;
3. remove the directions of those accepted from all tokens.

The picks are those of the recurrence on all tokens. Products with all tokens are in float32, but for the first panel:
real tokens share most of their energy, and what tells them apart would drown in rounding. Everything smaller is in
float64. No matrix is larger than the tokens; :func:`peak_bytes` says what a GPU needs, which runs the same code as a
CPU and waits for the host twice in a panel.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.lazy import Tensor, torch
from vllm_vtprune.selectors.similarity import GPU_CHUNK, chunks, squared_lengths

SPANNED = 1e-5  # residual, as a share of the token's own energy, that may be rounding of a float32 product
NEGLIGIBLE = 1e-12  # the same, as a share of the largest token's energy
FIRST_PANEL = 16  # picks
PANEL = 64
CANDIDATES = 2  # tokens among which a panel is picked, as a multiple of its picks

PANEL_BYTES = 33  # for each token and pick of a panel, at one time
TOKEN_VECTORS = 12  # float64 numbers for each token, at one time

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
    spanned, late = spanned_below(energy), -1 / gate  # the score of a spanned token is below every other

    def scores(residual: Tensor) -> Tensor:
        return torch.where(residual > spanned, residual * gate, late)

    left, residual = tokens.clone(), energy.clone()
    panel, dtype = FIRST_PANEL, torch.float64
    pick = torch.tensor([seed]).to(tokens.device)
    order = pick[:0]
    while len(order) < k:
        count = min(panel, k - len(order))
        best = scores(residual).index_fill_(0, pick, torch.inf)  # a seed may have any score
        near = best.topk(min(CANDIDATES * count, len(best))).indices.sort().values
        vectors = left[near].double()
        known = torch.stack([residual, gate, spanned, best])[:, near]
        table = torch.cat([vectors @ vectors.T, known]).cpu().numpy()
        steps, lower = _steps(table[:-4], table[-4], table[-3], table[-2], int(table[-1].argmax()), count)
        if steps:
            places, corner = torch.tensor(steps).to(near.device), torch.tensor(lower).to(near.device)
            draft = near[places]
            basis = torch.linalg.solve_triangular(corner, vectors[places], upper=False).to(dtype)  # orthonormal
            parts = [basis @ chunk.to(dtype).T for chunk in chunks(left)]
            after = torch.cat(parts, dim=1).double().square_().cumsum_(dim=0).neg_().add_(residual)  # each pick
            taken = draft[: _agreed(scores(after), draft)]
            del after
            if len(order) + len(taken) < k:  # else nobody reads what is left
                for chunk, part in zip(chunks(left), parts, strict=True):
                    chunk -= part[: len(taken)].T @ basis[: len(taken)]
                del parts
                residual = squared_lengths(left)
            panel, dtype = PANEL, torch.float32
        elif len(order):  # all are spanned
            taken = late.sort(descending=True, stable=True).indices[: k - len(order)]
        else:  # a seed that is next to zero
            taken = pick
        order = torch.cat([order, taken])
        residual.index_fill_(0, order, 0.0)
        late.index_fill_(0, taken, -torch.inf)
        pick = scores(residual).argmax(dim=0, keepdim=True)
    return order


def peak_bytes(n: int, d: int, k: int) -> int:
    """The most memory that ``k`` picks of ``n`` tokens of width ``d`` take on a GPU, the tokens in float32 included."""
    panel = min(PANEL, k)
    draft, chunk = min(CANDIDATES * panel, n), min(GPU_CHUNK, n)
    small = 8 * (d * (draft + 2 * panel) + 2 * draft * draft + TOKEN_VECTORS * n)
    return 2 * 4 * n * d + max(PANEL_BYTES * n * panel, 8 * (n * panel + chunk * d)) + small


def spanned_below(energy: Tensor) -> Tensor:
    """Residual energies ``(N,)`` up to which a token of ``energy (N,)`` counts as spanned by those chosen."""
    return torch.maximum(energy * SPANNED, energy.max() * NEGLIGIBLE)


def _agreed(ranked: Tensor, draft: Tensor) -> int:
    """How many picks of ``draft (b,)`` were the best, by the scores ``ranked (b, N)`` after each; at least one."""
    place = torch.arange(len(draft), device=draft.device)
    ranked[:, draft] = ranked[:, draft].masked_fill(place[:, None] >= place, -torch.inf)  # those picked by then
    return 1 + int((ranked[:-1].argmax(dim=1) == draft[1:]).cumprod(dim=0).sum())


def _steps(
    gram: Floats, residual: Floats, gate: Floats, spanned: Floats, pick: int, count: int
) -> tuple[list[int], Floats]:
    """At most ``count`` steps of the recurrence, from ``pick``, until what is left is spanned.

    ``gram (m, m)`` is what is left of the Gram matrix of ``m`` tokens; the other arrays are ``(m,)``. Returns the
    picks, and the lower triangle of the Cholesky factor of their Gram matrix.
    """
    rows = np.empty((count, len(gram)))
    order: list[int] = []
    while len(order) < count and residual[pick] > spanned[pick]:
        known = rows[: len(order)]
        row = (gram[pick] - known[:, pick] @ known) / np.sqrt(residual[pick])
        rows[len(order)] = row
        residual = residual - row * row
        residual[pick] = 0.0
        order.append(pick)
        pick = int(np.argmax(np.where(residual > spanned, residual * gate, 0.0)))
    return order, rows[: len(order), order].T
