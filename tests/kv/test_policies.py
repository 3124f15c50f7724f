"""Which blocks leave: in an order that leaves the others of use, and by what was seen of blocks like them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from sagellm.errors import UserError
from sagellm.kv import lifetime
from sagellm.kv.blocks import BRANCHED, KINDS, Blocks, whose
from sagellm.kv.policies import POLICIES, policy


def filled(*chains: list[int], count: int = 40) -> Blocks:
    """Blocks of sequences, from their beginning on, each used once in this order."""
    blocks = Blocks(count, count)
    for chain in chains:
        for depth, block in enumerate(chain):
            if not blocks["entered"][block]:
                blocks.enter(block, chain[depth - 1] if depth else -1, depth, -1)
        blocks.use(np.array(chain), 0)
    return blocks


trees = st.lists(st.integers(0, 10**6), min_size=1, max_size=30)
"""Of each block but the first, some number that picks its parent."""


@examples(100)
@given(trees, st.data())
def test_a_block_stays_while_one_behind_it_stays(tree, data):
    blocks = Blocks(len(tree) + 2, 4)
    for block, pick in enumerate(tree, 2):
        parent = 1 + pick % (block - 1)
        blocks.enter(block, parent, int(blocks["depth"][parent]) + 1, -1)
    idle = np.arange(1, len(tree) + 2)
    worth = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(idle), max_size=len(idle))), float)
    count = data.draw(st.integers(1, len(idle)))
    chosen = blocks.first_to_leave(idle, worth, count).tolist()
    assert len(set(chosen)) == count
    for at, block in enumerate(chosen):
        behind = [b for b in idle.tolist() if b > 1 and blocks["parent"][b] == block]
        assert set(behind) <= set(chosen[:at])
    if count == 1:
        subtree = {b: worth[b - 1] for b in idle.tolist()}
        for b in reversed(idle.tolist()[1:]):
            subtree[int(blocks["parent"][b])] = max(subtree[int(blocks["parent"][b])], subtree[b])
        assert subtree[chosen[0]] == min(subtree.values())


def test_what_is_known_of_a_conversation():
    blocks = filled([1, 2, 3], [1, 2, 3, 4], [1, 2, 5])
    assert blocks["turn"][[1, 3, 4, 5]].tolist() == [BRANCHED, 1, 1, BRANCHED]
    assert blocks["uses"][[1, 3, 4]].tolist() == [3, 2, 1]
    assert blocks["span"][[4, 5]].tolist() == [4, 3]


def leaves_first(name: str, blocks: Blocks, idle: list[int]) -> int:
    chosen = policy(name)(blocks)
    return int(blocks.first_to_leave(np.array(idle), chosen.worth(np.array(idle)), 1)[0])


def test_each_policy_has_its_favourites():
    blocks = filled([1], [1], [1], [2], [2], [3])
    assert leaves_first("lru", blocks, [1, 2, 3]) == 1
    assert leaves_first("lfu", blocks, [1, 2, 3]) == 3
    assert leaves_first("slru", blocks, [1, 2, 3]) == 3
    assert leaves_first("lfu-aging", blocks, [1, 2, 3]) == 1  # counts only what it saw
    long = filled([1, 2, 3, 4, 5, 6], [7, 8])
    assert leaves_first("lru", long, list(range(1, 9))) == 6
    urgent = filled([1], [2])
    urgent.use(np.array([1]), 5)
    assert leaves_first("priority", urgent, [1, 2]) == 1


def test_what_was_hot_once_may_leave_by_aging_lfu():
    blocks = Blocks(10, 4)
    aging = policy("lfu-aging")(blocks)

    def use(block: int):
        if not blocks["entered"][block]:
            blocks.enter(block, -1, 0, -1)
        blocks.use(np.array([block]), 0)
        aging.after_use(np.array([block]))

    for block in (1, 1, 1, 2, 2, 2, 2):
        use(block)
    aging.evicted(np.array([2]))  # of worth 4
    use(3)
    idle = np.array([1, 3])
    assert blocks.first_to_leave(idle, aging.worth(idle), 1).tolist() == [1]


def test_tail_optimised_lru_gives_up_the_end_of_a_fresh_sequence_first():
    blocks = Blocks(40, 4)
    tail = policy("t-lru")(blocks)
    for start, length in ((1, 4), (5, 12)):
        for depth in range(length):
            blocks.enter(start + depth, start + depth - 1 if depth else -1, depth, -1)
        chain = np.arange(start, start + length)
        blocks.use(chain, 0)
        tail.after_use(chain)
    idle = np.arange(1, 17)
    order = blocks.first_to_leave(idle, tail.worth(idle), 9).tolist()
    assert order == [4, 3, 2, 1, 16, 15, 14, 13, 12], "four blocks of either may be computed again"


def test_s3_fifo_drops_first_what_came_and_was_not_used_again():
    blocks = Blocks(10, 4)
    fifo = policy("s3-fifo")(blocks)
    for block in (1, 2, 3, 1):
        if not blocks["entered"][block]:
            blocks.enter(block, -1, 0, -1)
        blocks.use(np.array([block]), 0)
        fifo.after_use(np.array([block]))
    idle = np.array([1, 2, 3])
    assert blocks.first_to_leave(idle, fifo.worth(idle), 3).tolist() == [2, 3, 1]


@examples(30)
@given(st.lists(st.floats(0, 0.9), min_size=lifetime.BINS, max_size=lifetime.BINS))
def test_density_is_the_best_ratio_of_uses_to_time(hazard):
    """Against its definition, age by age."""
    hazard = np.array(hazard)
    got = lifetime.density(hazard[None])[0]
    for age in range(0, lifetime.BINS, 7):
        alive, used, held, best = 1.0, 0.0, 0.0, 0.0
        for at in range(age, lifetime.BINS):
            held += alive * (1 - hazard[at] / 2) * (lifetime.EDGES[at + 1] - lifetime.EDGES[at])
            used += alive * hazard[at]
            alive *= 1 - hazard[at]
            best = max(best, used / held)
        if np.prod(1 - hazard[:age]) > 1e-9:
            assert got[age] == pytest.approx(best, rel=1e-5, abs=1e-12)


def curves(used: dict[int, float], exposed: dict[int, float]) -> np.ndarray:
    """P(used in a bin | not before) [C, A], where these classes were seen, alike in all bins."""
    counts = np.zeros((2, lifetime.CLASSES, lifetime.BINS))
    for at, seen in enumerate((used, exposed)):
        for kind, count in seen.items():
            counts[at, kind] = count
    hazard, like = lifetime.shrunk(*counts)
    return hazard[like]


@examples(20)
@given(
    st.dictionaries(
        st.integers(0, lifetime.CLASSES - 1),
        st.tuples(st.floats(0, 100), st.floats(0, 1)),
        max_size=8,
    )
)
def test_what_is_expected_of_blocks_is_a_probability(seen):
    hazard = curves(
        {kind: n * share for kind, (n, share) in seen.items()}, {k: n for k, (n, _) in seen.items()}
    )
    assert (hazard >= 0).all() and (hazard < 1).all()


def test_a_class_is_like_its_wider_kind_until_enough_is_seen_of_it():
    """Classes 0 to 2 differ in their length alone; class CLASSES - 1 differs in all."""
    far = lifetime.CLASSES - 1
    used, exposed = {0: 50.0, far: 0.0}, {0: 100.0, far: 1000.0}
    unseen = curves(used, exposed)
    assert (unseen[1] == unseen[2]).all() and unseen[1] == pytest.approx(unseen[0], rel=0.1)
    assert (unseen[far] < 0.01).all()
    few, many = (curves(used | {1: 0.0}, exposed | {1: sequences})[1, 0] for sequences in (0.01, 1000.0))
    assert few == pytest.approx(unseen[1, 0], rel=0.3) and many < 0.01


def test_lifetime_learns_when_blocks_come_back():
    """Blocks of short sequences are used every 200 blocks, those of long ones never."""
    blocks = Blocks(4000, 4000)
    life = lifetime.Lifetime(blocks)
    again = np.array([1])
    blocks.enter(1, -1, 0, -1)
    block = 2
    for round in range(60):
        if round:
            life.before_use(again, blocks.clock - blocks["last_use"][again])
        blocks.use(again, 0)
        life.after_use(again)
        for _ in range(5):
            long = np.arange(block, block + 10)
            for depth, one in enumerate(long):
                blocks.enter(int(one), int(one) - 1 if depth else -1, depth, -1)
            blocks.use(long, 0)
            life.after_use(long)
            block += 10
    worth = life.worth(np.array([1, block - 20]))
    assert worth[0] > 3 * worth[1]


def test_tenants_and_kinds_of_requests_are_told_apart():
    """Of as much as is foretold of each, one tenant's blocks come back and another's do not; a third is new."""
    eager, once, new, formed = whose(1, 0), whose(2, 0), whose(3, 0), whose(1, 1)
    used, foretold = np.zeros((2, lifetime.TENANTS * len(KINDS), *lifetime.WHOSE[2:]))
    foretold[[eager, once], 0] = 100.0
    used[eager, 0] = 200.0
    got = lifetime.factors(used.reshape(lifetime.WHOSE), foretold.reshape(lifetime.WHOSE)).reshape(used.shape)
    assert (got[eager, 0] > 1.9).all() and (got[once, 0] < 0.1).all()
    assert got[eager, 1] == pytest.approx(got[eager, 0], rel=0.1), "as other blocks of that tenant"
    assert got[new] == pytest.approx(1.0, abs=0.01) == got[formed], "as usual"
    used[once, 0] = 200.0
    got = lifetime.factors(used.reshape(lifetime.WHOSE), foretold.reshape(lifetime.WHOSE))
    assert got == pytest.approx(1.0, abs=1e-9), "where all are alike nothing changes"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_why(name):
    blocks = filled([1, 2])
    assert (
        policy(name)(blocks).why(blocks.records[2], blocks.clock + 3).startswith("used once, last 3 blocks")
    )


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="unknown policy 'fifo'"):
        policy("fifo")
