"""From logits to tokens: plain torch kernels that any backend may use.

Logits are float32 [B, V], one row per sequence; parameters are tensors [B] on the same device. Nothing is changed
in place. The filters compose in the order of transformers' `generate` (`_get_logits_processor`): `penalize`,
`temperature_scale`, `top_k`, `top_p`, `min_p`; then `draw`. Each keeps exactly the tokens that transformers' own
processor keeps on the CPU; `_ascending` tells the one exception, among equal logits. A filter that no row needs may
be left out: it would change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLDEST = 1e-6
"""Lower temperatures count as this one, so that scaled logits stay finite; the draw is the argmax by then."""
_BELOW_ONE = 1 - 2**-52
"""Times any float64 sum, this is less than that sum."""


def allow(logits: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """Mask rows int64 [G] with -inf where allowed bool [G, V or wider] is false."""
    return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed[:, : logits.shape[1]], -torch.inf))


def bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Add values float32 [K] at (rows, tokens), both int64 [K]; -inf forbids a token."""
    return logits.index_put((rows, tokens), values, accumulate=True)


def penalize(
    logits: Tensor,
    tokens: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Repetition penalty, then frequency and presence penalty, in vLLM's order.

    tokens int64 [B, L] are prompt and output, of which row b uses the first lengths[b], the prompt's
    prompt_lengths[b] first; what follows is padding of any value. Repetition (Keskar et al. 2019) is over prompt
    and output: logits divided by it, negative ones multiplied. The other two are over the output alone, as
    OpenAI's API reference gives them: logit - count * frequency - (count > 0) * presence.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    used = position < lengths[:, None]
    output = used & (position >= prompt_lengths[:, None])
    index = tokens.masked_fill(~used, 0)
    seen = torch.zeros_like(logits).scatter_add(1, index, used.to(logits.dtype)) > 0
    count = torch.zeros_like(logits).scatter_add(1, index, output.to(logits.dtype))

    repetition, presence, frequency = (p.to(logits.dtype)[:, None] for p in (repetition, presence, frequency))
    repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
    penalized = torch.where(seen, repeated, logits)
    return penalized - count * frequency - (count > 0) * presence


def temperature_scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits over temperature; rows of temperature 0 (greedy) stay as they are."""
    divisor = temperature.to(logits.dtype).clamp(min=_COLDEST)
    return logits / torch.where(temperature == 0, 1.0, divisor)[:, None]


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Mask with -inf what is less likely than the k-th likeliest token; ties with it stay. k is whole, 0 for all.

    Reads the greatest k back from the device: the k best of a row cost far less to find than its sort.
    """
    k = k.clamp(max=logits.shape[1])
    widest = int(k.max())
    if widest == 0:
        return logits.clone()
    best = logits.topk(widest).values
    threshold = best.gather(1, (k.long() - 1).clamp(min=0)[:, None])
    return logits.masked_fill((logits < threshold) & (k > 0)[:, None], -torch.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """Mask with -inf all but the fewest likeliest tokens whose probabilities sum to p at least; 1 keeps all.

    Give p in float64: transformers subtracts from 1 in float64, which may round otherwise at an exact tie.
    Only rows with p below 1 are sorted; which these are is read back from the device.
    """
    rows = (p < 1).nonzero()[:, 0]
    masked = logits.clone()
    if len(rows) == 0:
        return masked
    chosen = logits[rows]
    ascending, index = _ascending(chosen)
    mass = ascending.softmax(dim=-1).cumsum(dim=-1)
    surplus = mass[:, -index.shape[1] :] <= (1 - p[rows]).to(logits.dtype)[:, None]
    surplus[:, -1] = False
    masked[rows] = chosen.scatter(1, index, chosen.gather(1, index).masked_fill(surplus, -torch.inf))
    return masked


def _ascending(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row sorted up, [B, V], and the tokens at its last places, [B, M]; before these all is -inf.

    After top-k few logits are finite, and sorting those alone is several times faster at V = 150,000. Equal logits
    then stand by token id, where transformers leaves their order to torch's unstable sort.
    """
    finite = max(1, int((logits > -torch.inf).count_nonzero(dim=-1).max()))
    if finite > logits.shape[1] // 8:
        return logits.sort(dim=-1)
    candidates = logits.topk(finite).indices.sort(dim=-1).values
    values, order = logits.gather(1, candidates).sort(dim=-1, stable=True)
    ascending = torch.full_like(logits, -torch.inf)
    ascending[:, -finite:] = values
    return ascending, candidates.gather(1, order)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Mask with -inf what is less likely than p times the likeliest token; 0 keeps all (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    threshold = p.to(logits.dtype)[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, -torch.inf)


def draw(logits: Tensor, uniform: Tensor, greedy: Tensor) -> Tensor:
    """One token per row, int64 [B]: the argmax where greedy (bool), else drawn from the softmax.

    The draw inverts the cumulative distribution at uniform, in [0, 1): it takes the first token at which the sum
    of probabilities exceeds that share of the total. A token of probability 0 is never taken, even where uniform
    rounds to 1. Sums are float64, since 100,000 float32 terms would lose the unlikely tokens.
    """
    probabilities = logits.softmax(dim=-1)
    mass = probabilities.cumsum(dim=-1, dtype=torch.float64).masked_fill_(probabilities == 0, 0)
    target = uniform.to(torch.float64).clamp(max=_BELOW_ONE) * mass.amax(dim=-1)
    drawn = (mass > target[:, None]).int().argmax(dim=-1)
    return torch.where(greedy, logits.argmax(dim=-1), drawn)


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities under the raw logits, before any penalty, temperature or filter.

    Returns those of tokens int64 [B] as float32 [B], and the `top` likeliest tokens of each row with theirs:
    int64 [B, top] and float32 [B, top], the likeliest first.
    """
    scores = logits.log_softmax(dim=-1)
    best = scores.topk(top)
    return scores.gather(1, tokens[:, None])[:, 0], best.indices, best.values
