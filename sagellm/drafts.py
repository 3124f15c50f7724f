"""What may come next: text that was seen before, found by its last tokens, or what a smaller model says. Leaf, numpy
only.

As in SuffixDecoding (Oliaro et al. 2024) and prompt lookup, guesses are what followed the longest repetition of a
sequence's end, in its own text or in that of others of the same tenant. Instead of a suffix tree there is a table of
hashed n-grams of a few lengths, so that one step costs the same few numpy calls for any number of sequences, and memory
is bounded: text of sequences that ended lies in a ring, and newer n-grams take the place of older ones.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from attrs import frozen

from sagellm.batch import MOST_DRAFTS, Columns
from sagellm.target import StepCost
from sagellm.trees import Trees

LENGTHS = (16, 8, 4, 2)
"""Of the n-grams, the longest first."""
LONGEST = LENGTHS[0]
DEPTHS = (12, 4)
"""Most guesses along the first and the second continuation; together at most `MOST_DRAFTS`."""
DEPTH = DEPTHS[0]
HISTORY = 1 << 17
"""Tokens kept of sequences that ended, and n-grams kept of each length: 6 MiB in all."""
NOTHING = -1
MODEL = len(LENGTHS)
"""The level of guesses that a draft model made; the others are n-gram lengths."""

FORGET = 0.98
"""Weight of what was seen before, each time that guesses of an n-gram length are verified."""
PRIOR = (0.8, 0.7, 0.6, 0.5, 0.6)
"""Part of the guesses that is expected to hold, by level, before any was verified; worth `TRUST` guesses."""
TRUST = 4.0
MOST = 0.97
"""No guess is surer than this."""


@frozen
class Guesses:
    """For D rows, two continuations: after the longest repetition, and after a shorter one that goes on otherwise."""

    tokens: np.ndarray
    """int32 [D, 2, DEPTH], -1 behind the end."""
    chances: np.ndarray
    """float64 [D, 2, DEPTH]: how likely each guess, with all before it, will hold; 0 where there is none. What the
    second has in common with the first counts there."""
    fork: np.ndarray
    """[D] how many guesses both begin with."""
    level: np.ndarray
    """[D] which of LENGTHS the first was found by."""


class DraftModel(Protocol):
    """A smaller model that guesses what a larger one will say."""

    cost: StepCost
    longest: int
    """Tokens of the longest sequence that it can guess for."""

    def behind(self, rows: np.ndarray) -> np.ndarray:
        """[D] tokens of each row, all but the last, that it has not seen."""
        ...

    def guess(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """int32 [D, depth]: how each row may go on, -1 behind the end; none where it has no room or not yet caught
        up."""
        ...


class Drafts:
    """The text of the running sequences, which stays in the columns, and of those that ended."""

    def __init__(self, columns: Columns):
        self.columns = columns
        self.waited = self.model_waited = 0
        """Steps since guesses that did not seem to pay were last tried, and those of the draft model."""
        self.rest = self.pause = 0
        """Steps that nothing is looked for, and how many of them a vain look is worth: more after each, none after a
        good one."""
        self.model_rest = self.model_pause = 0
        """The same, of asking the draft model."""
        self._table: np.ndarray | None = None

    def _begin(self) -> None:
        capacity, rng = self.columns.capacity, np.random.default_rng(0)
        self._live = self.columns.tokens.size
        self._table = np.full(len(LENGTHS) * HISTORY + 1, NOTHING, np.int64)
        """Hash of an n-gram -> where the text goes on, one part for each length; the last entry takes what is none."""
        self._text = np.full(HISTORY, NOTHING, np.int32)
        """A ring; sequences are parted by -1."""
        self._tenant = np.zeros(HISTORY, np.int64)
        self._head = 0
        self._factors = rng.integers(1, 2**63, (LONGEST, len(LENGTHS)), np.uint64) | np.uint64(1)
        self._inside = np.arange(LONGEST)[:, None] >= LONGEST - np.array(LENGTHS)
        self._factors *= self._inside
        self._part = np.arange(len(LENGTHS)) * HISTORY
        self._number = np.full(capacity, NOTHING, np.int64)
        self._sample = np.zeros(capacity, np.int64)
        self._seen = np.zeros(capacity, np.int64)
        """Tokens of the row whose n-grams are in the table: all but the last, behind which nothing is known yet."""
        self._held, self._tried = np.zeros((2, capacity, 2))
        """By row, of guesses from text and from a model."""
        self._level = np.zeros(capacity, np.int64)
        self.held, self.tried = np.array(PRIOR) * TRUST, np.full(len(PRIOR), TRUST)
        """Guesses that held, and that were verified behind ones that held, by level; older ones count less."""

    # text comes and goes

    def follow(self, rows: np.ndarray) -> np.ndarray:
        """Take in what these rows got since they were last seen. Returns where their ends were seen before: int64
        [D, LENGTHS], -1 for nowhere."""
        self._meet(rows)
        c = self.columns
        lag = c.length[rows] - self._seen[rows]
        last = np.cumsum(lag) - 1
        owner = np.repeat(rows, lag)
        ends = c.length[owner] - (np.repeat(last, lag) - np.arange(len(owner)))
        self._seen[rows] = c.length[rows] - 1
        at = ends[:, None] + np.arange(-LONGEST, 0)
        entries = self._entries(c.tokens[owner[:, None], np.maximum(at, 0)], c.tenant[owner], ends)
        places = owner * c.max_length + ends
        table, before = self._table, np.ones(len(owner), bool)
        before[last] = False
        table[entries[before]] = places[before, None]
        table[-1] = NOTHING
        return table[entries[last]]

    def _meet(self, rows: np.ndarray) -> None:
        """Of rows that others had before, nothing is known."""
        if self._table is None:
            self._begin()
        c = self.columns
        fresh = (self._number[rows] != c.number[rows]) | (self._sample[rows] != c.sample[rows])
        if fresh.any():
            new = rows[fresh]
            self._number[new], self._sample[new] = c.number[new], c.sample[new]
            self._seen[new] = self._held[new] = self._tried[new] = 0

    def _entries(self, windows: np.ndarray, tenants: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Table entries int64 [K, LENGTHS] of the n-grams at the end of windows [K, LONGEST]; the text before that end
        has `lengths` tokens."""
        mixed = (windows.astype(np.uint64) + np.uint64(1)) @ self._factors
        mixed += tenants.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        entries = (mixed >> np.uint64(64 - HISTORY.bit_length() + 1)).astype(np.int64) + self._part
        return np.where(lengths[:, None] >= np.array(LENGTHS), entries, len(self._table) - 1)

    def ended(self, row: int) -> None:
        """Keep the text of a row whose sequence ends."""
        if self._table is None:
            return
        c, count = self.columns, min(int(self.columns.length[row]), HISTORY // 4)
        if self._head + count + 1 > HISTORY:
            self._text[self._head :], self._head = NOTHING, 0
        begin = self._head
        text = c.tokens[row, c.length[row] - count : c.length[row]]
        self._text[begin : begin + count], self._text[begin + count] = text, NOTHING
        self._tenant[begin : begin + count] = c.tenant[row]
        self._head += count + 1
        if count <= LENGTHS[-1]:
            return
        ends = np.arange(1, count)
        windows = text[np.maximum(ends[:, None] + np.arange(-LONGEST, 0), 0)]
        entries = self._entries(windows, np.full(count - 1, c.tenant[row]), ends)
        self._table[entries] = (self._live + begin + ends)[:, None]
        self._table[-1] = NOTHING

    def _read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 [..., LONGEST + DEPTH]: the tokens before and behind these places, -1 where their text has ended; and
        whose they are."""
        c, ring = self.columns, places >= self._live
        row = np.where(ring, 0, places) // c.max_length
        ends = np.where(ring, self._live + HISTORY, row * c.max_length + c.length[row])
        at = np.maximum(places[..., None] + np.arange(-LONGEST, DEPTH), 0)
        text = c.tokens.ravel()[np.minimum(at, self._live - 1)]
        tenants = c.tenant[row]
        if ring.any():
            text = np.where(at < self._live, text, self._text[np.clip(at - self._live, 0, HISTORY - 1)])
            tenants = np.where(ring, self._tenant[np.where(ring, places - self._live, 0)], tenants)
        text[at >= ends[..., None]] = NOTHING
        return text, tenants

    # guesses

    def guess(self, rows: np.ndarray, found: np.ndarray) -> Guesses | None:
        """What may follow these rows, where `follow` found something; None where nothing stands the test: the hash may
        lie, the text may have changed, the tenant may be another."""
        c, d = self.columns, np.arange(len(rows))
        ends = c.length[rows]
        windows = c.tokens[rows[:, None], np.maximum(ends[:, None] + np.arange(-LONGEST, 0), 0)]
        text, tenants = self._read(np.maximum(found, 0))
        same = (text[..., :LONGEST] == windows[:, None]) | ~self._inside.T
        good = (found >= 0) & same.all(2) & (text[..., LONGEST] != NOTHING)
        good &= tenants == c.tenant[rows][:, None]
        if not good.any():
            return None
        first = good.argmax(1)
        other = good & (found != found[d, first][:, None])
        second = other.argmax(1)
        levels = np.stack([first, second], 1)
        there = np.stack([good.any(1), other.any(1)], 1)
        tokens = self._continue(rows, found[d[:, None], levels], text[d[:, None], levels, LONGEST:])
        tokens[~there] = NOTHING
        tokens[(tokens == NOTHING).cumsum(2) > 0] = NOTHING
        fork = (tokens[:, 0] == tokens[:, 1]).cumprod(1).sum(1)
        return Guesses(tokens, self._chances(rows, levels, tokens, fork), fork, first)

    def _continue(self, rows: np.ndarray, places: np.ndarray, text: np.ndarray) -> np.ndarray:
        """What follows these places, from the text there [D, 2, DEPTH]. A row that repeats itself goes round: what it
        repeats may be shorter than what is guessed."""
        c = self.columns
        first = rows[:, None] * c.max_length
        period = first + c.length[rows][:, None] - places
        period = np.where((places >= first) & (period > 0), period, DEPTH)
        return np.take_along_axis(text, np.arange(DEPTH) % period[..., None], 2)

    def _chances(self, rows, levels, tokens, fork) -> np.ndarray:
        of_level = self.held / self.tried
        held = self._held[rows, :1] + TRUST * of_level[levels]
        each = np.minimum(held / (self._tried[rows, :1] + TRUST), MOST)[..., None]
        depth = np.arange(DEPTH)
        along = each ** (depth + 1)
        instead = (1 - each[:, 0]) * each[:, 0] ** fork[:, None]
        apart = depth - fork[:, None]
        along[:, 1] = instead * each[:, 1] ** np.maximum(apart + 1, 1)
        c = self.columns
        left = np.minimum(c.limit[rows], c.max_length) - c.length[rows] - 1
        allowed = (tokens != NOTHING) & (depth < left[:, None, None])
        allowed[:, 1] &= (apart >= 0) & (apart < DEPTHS[1])
        return np.where(allowed, along, 0.0)

    def write(self, rows: np.ndarray, guesses: Guesses, chosen: np.ndarray) -> None:
        """Put the chosen guesses, bool [D, 2, DEPTH], into the columns. Python work for the rows that have some."""
        c = self.columns
        first, second = chosen.sum(2).T.tolist()
        for i in np.flatnonzero(chosen.any((1, 2))).tolist():
            row, a, b, fork = int(rows[i]), first[i], second[i], int(guesses.fork[i])
            c.drafted[row], self._level[row] = a + b, guesses.level[i]
            c.draft_tokens[row, :a] = guesses.tokens[i, 0, :a]
            c.draft_parents[row, :a] = np.arange(a)
            c.draft_tokens[row, a : a + b] = guesses.tokens[i, 1, fork : fork + b]
            c.draft_parents[row, a : a + b] = [fork, *range(a + 1, a + b)][:b]

    def of_model(self, rows: np.ndarray) -> np.ndarray:
        """[D] how likely a draft model's next guess for each row holds."""
        self._meet(rows)
        held = self._held[rows, 1] + TRUST * self.held[MODEL] / self.tried[MODEL]
        return np.minimum(held / (self._tried[rows, 1] + TRUST), MOST)

    def write_model(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Put a draft model's guesses, int32 [D, depth] with -1 behind the end, into the columns."""
        c, depth = self.columns, tokens.shape[1]
        c.drafted[rows], self._level[rows] = (tokens >= 0).sum(1), MODEL
        c.draft_tokens[rows, :depth] = np.maximum(tokens, 0)
        c.draft_parents[rows] = np.arange(MOST_DRAFTS)

    def learn(self, trees: Trees, nodes: np.ndarray) -> None:
        """How far the first continuation of each tree held."""
        rows, cells = trees.rows[nodes], trees.cells[nodes]
        along = (cells > 0) & (cells == trees.depths[nodes])
        capacity = self.columns.capacity
        held = np.bincount(rows[along], minlength=capacity)
        first = (trees.cells > 0) & (trees.cells == trees.depths)
        guessed = np.bincount(trees.rows[first], minlength=capacity)
        rows = np.flatnonzero(guessed)
        held, tried = held[rows], np.minimum(held[rows] + 1, guessed[rows])
        levels = self._level[rows]
        by = rows, (levels == MODEL).astype(int)
        self._held[by] = FORGET**4 * self._held[by] + held
        self._tried[by] = FORGET**4 * self._tried[by] + tried
        kept = FORGET ** np.bincount(levels, minlength=len(PRIOR))
        self.held = self.held * kept + np.bincount(levels, held, len(PRIOR))
        self.tried = self.tried * kept + np.bincount(levels, tried, len(PRIOR))
