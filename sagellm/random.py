"""Random numbers without a state: a draw is a pure function of (seed, position, sample index).

Which other requests share a batch, how often a step is run again, or which process draws cannot change a number.
The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
A leaf: numpy only.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
"""Constants of the paper, as in Random123's philox.h; the key steps are the golden ratio and sqrt(3) - 1."""


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Four random 32-bit words per column.

    counter uint64[4, B] and key uint64[2, B] hold 32-bit words, as does the result uint64[4, B].
    """
    even, odd = counter[0::2], counter[1::2]
    for step in range(_ROUNDS):
        product = even * _MULTIPLIERS
        high, low = product >> _WORD, product & _MASK
        round_key = (key + np.uint64(step) * _KEY_STEPS) & _MASK
        even, odd = high[::-1] ^ odd ^ round_key, low[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seed: np.ndarray, position: np.ndarray, sample_index: np.ndarray, stream: int = 0) -> np.ndarray:
    """float64[B] in [0, 1), with 53 random bits each.

    seed uint64[B]; position int64[B] of the token in its sequence; sample_index int64[B], below 2**32, of the
    sequence among those of one request. `stream` tells apart several draws for one token.
    """
    seed, position, sample_index = (np.asarray(x).astype(np.uint64) for x in (seed, position, sample_index))
    key = np.stack([seed & _MASK, seed >> _WORD])
    counter = np.stack(
        [position & _MASK, position >> _WORD, sample_index & _MASK, np.full_like(position, stream)]
    )
    words = philox4x32(counter, key)
    return ((words[0] << _WORD | words[1]) >> np.uint64(11)).astype(np.float64) * 2.0**-53
