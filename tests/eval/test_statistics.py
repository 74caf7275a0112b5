"""What a played episode counts as, and the statistics over many, by hand."""

import math

import pytest

from data.episodes import Episode
from data.render import KimiRenderer
from data.tasks import make_problem
from data.tokenizer import load_tokenizer
from data.tools import call
from eval.horizon import _measure
from eval.play import Played, Settings, longest_run, loops, play, played, repeats_calls
from eval.statistics import (
    MEASURES,
    bootstrap,
    bounds,
    divergence,
    first_difference,
    half_horizon,
    interval,
    step_accuracy,
    success,
    tokens_per_correct,
)


def made(solved=True, first_wrong=None, steps=10, ids=(1, 2), **fields):
    first_wrong = steps if first_wrong is None else first_wrong
    return Played(
        **dict(
            solved=solved,
            first_wrong=first_wrong,
            right=first_wrong,
            steps=steps,
            thinking=5,
            answer=1,
            tool=4,
            loops=False,
            overthought=False,
            calls=2,
            valid_calls=2,
            misnumbered=0,
            stopped="done",
            ids=list(ids),
        )
        | fields
    )


class Scripted:
    """Weights that say what rows hold: the whole chain right, or the first `right` replies and then nothing."""

    def __init__(self, rows, right=10**9):
        self.rows, self.right, self.calls = rows, right, 0

    def decoder(self, rows, positions=0):
        return self

    def reply(self, prompts, limit):
        self.calls += 1
        out = {}
        for number, prompt in prompts.items():
            row = next(row for row in self.rows if row[: len(prompt)] == prompt)
            out[number] = row[len(prompt) : row.index(258, len(prompt)) + 1] if self.calls <= self.right else [258]
        return out


def test_played_episodes_are_judged():
    renderer = KimiRenderer(load_tokenizer("bytes"))
    problems = [make_problem("pointer_chase", 0, i, 5) for i in range(3)]
    rows = [row.ids for p in problems for row in renderer.rows(p.messages, p.tools)]
    for right, solved, first_wrong, calls in ((99, True, 5, 5), (3, False, 3, 3)):
        for one in play(Scripted(rows, right), renderer, problems, Settings("interleaved", None)):
            assert (one.solved, one.first_wrong, one.right, one.steps, one.calls, one.valid_calls) == (
                solved,
                first_wrong,
                first_wrong,
                5,
                calls,
                calls,
            )
            assert one.tokens == len(one.ids) and not one.loops and one.stopped == "done"


def test_wrong_answers_after_right_steps_and_bad_calls():
    problem = make_problem("chain", 0, 0, 3)
    thoughts = problem.messages[1]["reasoning_content"]
    episode = Episode(problem.question, lambda _: [])
    episode.add([{"role": "assistant", "content": "x", "reasoning_content": thoughts}])
    episode.stopped = "done"
    assert played(problem, episode, [1]).overthought and not played(problem, episode, [1]).solved
    episode.messages[-1]["reasoning_content"] = thoughts[thoughts.rindex("\n") :] + "\n" + thoughts
    assert not played(problem, episode, [1]).overthought, "the last step is written, but not where it belongs"
    chase = make_problem("pointer_chase", 0, 0, 3)
    episode = chase.episode()
    episode.add(
        [{"role": "assistant", "content": "", "tool_calls": [call(0, "get", key="a"), call(1, "got"), call(2, "get", key=3)]}]
    )
    episode.failures, episode.unreadable = ["arguments of get are not JSON: {", "the section of calls is not closed"], 1
    assert (played(chase, episode, [1]).calls, played(chase, episode, [1]).valid_calls) == (4, 1)


def test_loops():
    assert loops([9, 8, *[1, 2, 3] * 11]) and loops([5] * 32)
    assert not loops([5] * 31) and not loops(list(range(100))) and not loops([*[1, 2, 3] * 20, 4]) and not loops([])
    assert repeats_calls("abbbbc") and not repeats_calls("abbbab") and not repeats_calls("")


def test_longest_run():
    assert longest_run([0, 0, 1, 1, 0.5, 0, 1]) == 3 and longest_run([1, 0]) == 1


def test_step_accuracy_counts_steps_up_to_the_first_wrong_one():
    """9 + 4 survived, one of the two chains broke: 13 of 14 tries. For p per step this is the estimate of p."""
    assert step_accuracy({10: [made(steps=9), made(False, 4, steps=9)]}) == 13 / 14
    assert step_accuracy({1: [made(False, 0)]}) == 0.0


@pytest.mark.parametrize("value, said", [(0.0, "< 10"), (26.4, "26"), (math.inf, "> 300")])
def test_a_horizon_outside_what_was_played_is_said_so(value, said):
    assert _measure("half_horizon", {"value": value, "interval": [value, value]}, 10, 300) == said


def test_horizon_is_read_off_the_curve():
    good, bad = [made()], [made(False, 3)]
    assert half_horizon({1: good, 10: good}) == math.inf and half_horizon({1: bad, 10: bad}) == 0.0
    assert half_horizon({1: good, 100: bad}) == pytest.approx(10.0)  # halfway in log n
    assert success(good * 3 + bad) == 0.75


def test_tokens_per_correct():
    assert tokens_per_correct({1: [made(), made(False)]}) == 20 and tokens_per_correct({1: [made(False)]}) == math.inf


def test_bootstrap_covers_and_is_the_same_every_time():
    plays = {1: [made(i % 4 > 0, None if i % 4 else 2) for i in range(12)], 3: [made()] * 4}
    for measure in MEASURES.values():
        low, high = bootstrap(plays, measure)
        assert low <= measure(plays) <= high and (low, high) == bootstrap(plays, measure)
    low, high = bootstrap(plays, step_accuracy)
    assert low < step_accuracy(plays) < high


def test_shares_have_a_width_where_all_chains_agree():
    """Of chains Wilson's for their number; of calls for as many chains as weigh alike: (4 * 2 + 2 * 20)^2 / (4 * 4 + 2 * 400)
    = 2.82 of these six."""
    plays = {2: [made(steps=2)] * 4, 20: [made(steps=20, calls=20, valid_calls=20)] * 2}
    for name in ("loops", "overthought", "out_of_replies"):
        assert bounds(plays, MEASURES[name]) == interval(0.0, 6) and 0.35 < interval(0.0, 6)[1] < 0.45
    assert bounds(plays, MEASURES["valid_calls"]) == interval(1.0, 48**2 / 816) and interval(1.0, 48**2 / 816)[0] < 0.5
    assert bounds(plays, step_accuracy) == interval(1.0, 48) and interval(1.0, 48)[0] > 0.9
    assert bounds({2: [made(False, 0, steps=2)] * 4}, step_accuracy) == interval(0.0, 4)
    mixed = {2: [made(loops=i == 0) for i in range(4)]}
    assert bounds(mixed, MEASURES["loops"]) == interval(0.25, 4)
    assert bounds(mixed, step_accuracy) == interval(1.0, 40) and bounds(mixed, half_horizon) == (math.inf, math.inf)
    without = {1: [made(calls=0, valid_calls=0)]}
    assert math.isnan(MEASURES["valid_calls"](without)) and all(map(math.isnan, bounds(without, MEASURES["valid_calls"])))


def test_the_last_digit_of_a_sum_counts_at_its_place():
    """dict_sum's steps are digits: a wrong answer is not one that was right on paper because the digit was seen before."""
    problem = next(p for i in range(99) if (p := make_problem("dict_sum", 0, i, 10)).steps[-1] in p.steps[:-1])
    episode = problem.episode()
    episode.add([*problem.messages[1:-1], {"role": "assistant", "content": "x"}])
    episode.stopped = "done"
    assert not played(problem, episode, [1]).overthought and played(problem, episode, [1]).first_wrong == 9


def test_divergence():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 2]) == 2 and first_difference([1], [2]) == 0
    reference, other = {1: [made(ids=[1, 2, 3])] * 2}, {1: [made(ids=[1, 2, 3]), made(ids=[1, 9])]}
    assert divergence(other, reference) == {"same_share": 0.5, "median_first_difference": 1.0}
    assert divergence(reference, reference) == {"same_share": 1.0, "median_first_difference": None}
