"""Searches where every path can be counted."""

import itertools
import math

import pytest

from jaxalign.errors import UserError
from jaxalign.prompting import beam_search, greedy_search, monte_carlo


class Digits:
    """A state is the digits so far; the reward of each state is a table's."""

    def __init__(self, reward, choices=3, good=math.inf):
        self.reward, self.choices, self.good = reward, choices, good
        self.moves = 0

    def root(self):
        return (), 0.0

    def satisfied(self, node):
        return node.reward > self.good

    def actions(self, paths, number):
        keep = [self.satisfied(path[-1]) for path in paths]
        return [[0] if kept else list(range(self.choices))[:number] for kept in keep]

    def move(self, steps):
        self.moves += len(steps)
        states = [(*path[-1].state, action) for path, action in steps]
        return [(state, float(self.reward(state))) for state in states]


def random_rewards(rng, depth, choices=3):
    table = {
        state: float(rng.uniform())
        for size in range(1, depth + 1)
        for state in itertools.product(range(choices), repeat=size)
    }
    return table


def mean_of(table, path):
    return sum(table[path[: size + 1]] for size in range(len(path))) / len(path)


def test_a_beam_as_wide_as_the_level_finds_the_best_path_of_all(rng):
    table = random_rewards(rng, 4)
    best = max(itertools.product(range(3), repeat=4), key=lambda path: mean_of(table, path))
    found = beam_search(Digits(table.__getitem__), width=81, actions=3, depth=4, more_depth=0)
    assert found.nodes[found.best].state == best
    assert found.nodes[found.best].value == pytest.approx(mean_of(table, best))
    assert [node.state for node in found.path(found.best)] == [best[:size] for size in range(5)]


def test_a_beam_is_the_textbook_beam(rng):
    table = random_rewards(rng, 5)
    beam = [()]
    for _ in range(5):
        children = [(*path, digit) for path in beam for digit in range(3)]
        beam = sorted(children, key=lambda path: -mean_of(table, path))[:2]
    found = beam_search(Digits(table.__getitem__), width=2, actions=3, depth=5, more_depth=0)
    assert [found.nodes[number].state for number in found.candidates] == beam


def trap(state):
    """The better first step leads nowhere."""
    return {0: 0.9, 1: 0.5}[state[0]] if len(state) == 1 else 0.0 if state[0] == 0 else 1.0


def test_greedy_falls_into_a_trap_that_a_beam_sees():
    greedy = greedy_search(Digits(trap, 2), actions=2, depth=3, more_depth=0)
    assert greedy.nodes[greedy.best].state[0] == 0
    beam = beam_search(Digits(trap, 2), width=3, actions=2, depth=3, more_depth=0)
    assert beam.nodes[beam.best].state[0] == 1


def test_satisfied_states_stay_and_make_the_search_deeper():
    world = Digits(lambda state: 5.0, good=4.5)
    found = beam_search(world, width=2, actions=3, depth=2, more_depth=3)
    # the root has reward 0 and all three actions; from then on every level adds one, three times
    assert found.nodes[found.best].depth == 5
    assert world.moves == 3 + 4 * 2


def test_the_released_settings_ask_twenty_to_thirty_queries():
    """Shipped paths have 30 states where most are good, and 28 where exactly eight are."""
    always = beam_search(Digits(lambda state: 5.0, good=4.5))
    assert len(always.path(always.best)) == 30
    never = beam_search(Digits(lambda state: 4.0, good=4.5))
    assert len(never.path(never.best)) == 20
    eight = beam_search(Digits(lambda state: 5.0 if len(state) <= 8 else 4.0, good=4.5))
    assert len(eight.path(eight.best)) == 28


def test_monte_carlo_of_depth_one_is_the_best_action():
    found = monte_carlo(Digits(lambda state: state[0], 5), paths=5, depth=1)
    assert found.nodes[found.best].state == (4,)
    deep = monte_carlo(Digits(lambda state: -state[0], 3), paths=3, depth=4)
    assert deep.nodes[deep.best].state == (0, 0, 0, 0)
    assert len(deep.nodes) == 1 + 3 * 4


def test_states_without_a_reward_do_not_go_on():
    def reward(state):
        return math.nan if state[-1] == 2 else -state[-1]

    found = beam_search(Digits(reward), width=3, actions=3, depth=2, more_depth=0)
    assert all(2 not in found.nodes[number].state for number in found.candidates)
    with pytest.raises(UserError, match="none of the 3 states at depth 1 has a reward"):
        beam_search(Digits(lambda state: math.nan), width=2, actions=3, depth=2)


@pytest.mark.parametrize("name", ["width", "actions", "depth"])
def test_sizes_are_positive(name):
    with pytest.raises(UserError, match=f"{name}: 0 is not positive"):
        beam_search(Digits(lambda state: 0.0), **{name: 0})


def test_everything_is_told_after_every_level():
    sizes = []
    world = Digits(lambda state: state[-1])
    beam_search(
        world, width=1, actions=3, depth=2, more_depth=0, watch=lambda n: sizes.append(len(n))
    )
    assert sizes == [1, 4, 7]
