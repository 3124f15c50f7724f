"""What is guessed: what followed the same tokens before, never another tenant's text."""

import numpy as np
import pytest

from sagellm.batch import Columns, Request, SamplingParams
from sagellm.drafts import DEPTH, HISTORY, Drafts
from sagellm.trees import Trees

NUMBER = iter(range(1, 10**9))


def make(capacity: int = 4, length: int = 600) -> tuple[Columns, Drafts]:
    columns = Columns(capacity, length, 8)
    return columns, Drafts(columns)


def begin(c: Columns, row: int, tokens, salt: str = "", max_tokens: int = 100) -> None:
    c.fill(
        row,
        Request(str(row), list(tokens), SamplingParams(max_tokens=max_tokens), salt=salt),
        number=next(NUMBER),
    )


def end(c: Columns, drafts: Drafts, row: int) -> None:
    drafts.ended(row)
    c.length[row], c.number[row] = 0, -1


def guessed(drafts: Drafts, row: int, which: int = 0) -> list[int]:
    rows = np.array([row])
    guesses = drafts.guess(rows, drafts.follow(rows))
    return [] if guesses is None else [t for t in guesses.tokens[0, which].tolist() if t >= 0]


def test_a_sequence_that_repeats_itself_is_expected_to_go_on_as_before():
    c, drafts = make()
    begin(c, 0, [9, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert guessed(drafts, 0) == [4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 1]


def test_text_that_repeats_nothing_gives_no_guess():
    c, drafts = make()
    begin(c, 0, range(50))
    assert guessed(drafts, 0) == []


def test_a_short_loop_is_expected_to_go_round():
    c, drafts = make()
    begin(c, 0, [7, 5, 6, 5, 6, 5, 6])
    assert guessed(drafts, 0) == [5, 6] * (DEPTH // 2)


def test_what_another_sequence_said_is_guessed_while_it_runs_and_after_its_end():
    c, drafts = make()
    text = list(range(100, 130))
    begin(c, 0, text)
    drafts.follow(np.array([0]))
    begin(c, 1, [1, 2, *text[:8]])
    assert guessed(drafts, 1) == text[8 : 8 + DEPTH]
    end(c, drafts, 0)
    begin(c, 0, [5] * 3)
    begin(c, 2, [3, *text[:10]])
    assert guessed(drafts, 2) == text[10 : 10 + DEPTH]


@pytest.mark.parametrize("ended", [False, True])
def test_a_tenant_never_gets_what_another_said(ended):
    c, drafts = make()
    text = list(range(100, 130))
    begin(c, 0, text, salt="one")
    drafts.follow(np.array([0]))
    if ended:
        end(c, drafts, 0)
    begin(c, 1, text[:12], salt="other")
    assert guessed(drafts, 1) == []
    begin(c, 2, text[:12], salt="one")
    assert guessed(drafts, 2) == text[12 : 12 + DEPTH]


def test_a_row_that_another_tenant_got_meanwhile_gives_nothing():
    """The table still points at the row; its text and tenant are what counts."""
    c, drafts = make()
    text = list(range(100, 130))
    begin(c, 0, text, salt="one")
    drafts.follow(np.array([0]))
    c.length[0], c.number[0] = 0, -1
    begin(c, 0, text, salt="other")
    begin(c, 1, text[:12], salt="one")
    assert guessed(drafts, 1) == []


def test_the_second_continuation_branches_off_where_it_differs():
    c, drafts = make()
    begin(c, 0, [1, 2, 3, 4, 5, 6, 7, 8, 50, 51, 90, 6, 7, 8, 50, 60, 91, 1, 2, 3, 4, 5, 6, 7, 8])
    rows = np.array([0])
    guesses = drafts.guess(rows, drafts.follow(rows))
    assert guesses.tokens[0, 0, :3].tolist() == [50, 51, 90]
    assert guesses.tokens[0, 1, :3].tolist() == [50, 60, 91] and guesses.fork[0] == 1
    chosen = np.zeros((1, 2, DEPTH), bool)
    chosen[0, 0, :3], chosen[0, 1, 1:3] = True, True
    drafts.write(rows, guesses, chosen)
    assert c.drafted[0] == 5
    assert c.draft_tokens[0, :5].tolist() == [50, 51, 90, 60, 91]
    assert c.draft_parents[0, :5].tolist() == [0, 1, 2, 1, 4]


def test_no_guess_goes_beyond_the_limit():
    c, drafts = make()
    begin(c, 0, [7, 5, 6, 5, 6, 5, 6], max_tokens=4)
    rows = np.array([0])
    guesses = drafts.guess(rows, drafts.follow(rows))
    assert (guesses.chances[0, 0] > 0).sum() == 3  # and one that needs no guess


def test_guesses_that_do_not_hold_are_expected_less_and_less():
    c, drafts = make()
    begin(c, 0, [7, 5, 6, 5, 6, 5, 6])
    rows = np.array([0])
    chances = []
    for _ in range(40):
        guesses = drafts.guess(rows, drafts.follow(rows))
        chances.append(guesses.chances[0, 0, 0])
        drafts.write(rows, guesses, guesses.chances > 0)
        trees = Trees.of(c, rows)
        drafts.learn(trees, np.array([0]))
    assert chances[-1] < 0.1 < chances[0]


def test_old_text_makes_room_for_new_text():
    c, drafts = make(length=2000)
    for i in range(2 * HISTORY // 1500):
        begin(c, 0, 100_000 * (i + 1) + np.arange(1500))
        drafts.follow(np.array([0]))
        end(c, drafts, 0)
    begin(c, 0, 100_000 + np.arange(500))
    assert guessed(drafts, 0) == []
    begin(c, 0, 100_000 * (i + 1) + np.arange(500))
    assert guessed(drafts, 0) == list(100_000 * (i + 1) + np.arange(500, 500 + DEPTH))
