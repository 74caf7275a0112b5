"""Numbers about sets of episodes, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.play import Played

RESAMPLES = 1000
Plays = Mapping[int, Sequence[Played]]
"""Chain length -> its episodes."""


def interval(share: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n trials: unlike a bootstrap it has a width where all trials agree."""
    if math.isnan(share):
        return share, share
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def success(plays: Sequence[Played]) -> float:
    return sum(p.solved for p in plays) / len(plays)


def step_accuracy(plays: Plays) -> float:
    """Share of steps that are right when all before them were: steps survived over steps tried. A run that stays right
    over n such steps has probability p^n, so this is the number that lengths can be compared by."""
    survived, tried = _steps(plays)
    return survived / tried


def _steps(plays: Plays) -> tuple[int, int]:
    """(steps survived, steps tried)."""
    every = [p for some in plays.values() for p in some]
    survived = sum(p.first_wrong for p in every)
    return survived, survived + sum(p.first_wrong < p.steps for p in every)


def half_horizon(plays: Plays) -> float:
    """Chain length at which half the problems are solved, interpolated over log n; 0 or inf when every measured length
    lies on one side."""
    lengths = sorted(plays)
    shares = [success(plays[n]) for n in lengths]
    below = next((i for i, share in enumerate(shares) if share < 0.5), None)
    if below is None:
        return math.inf
    if below == 0:
        return 0.0
    (low, high), (left, right) = lengths[below - 1 : below + 1], shares[below - 1 : below + 1]
    return math.exp(math.log(low) + (left - 0.5) / (left - right) * (math.log(high) - math.log(low)))


def tokens_per_answer(plays: Plays) -> float:
    every = [p for some in plays.values() for p in some]
    return sum(p.tokens for p in every) / len(every)


def tokens_per_correct(plays: Plays) -> float:
    """All generated tokens over the number of right answers; inf if there is none."""
    every = [p for some in plays.values() for p in some]
    right = sum(p.solved for p in every)
    return sum(p.tokens for p in every) / right if right else math.inf


@dataclass(frozen=True)
class Share:
    """The statistic "hits over trials of all episodes"; nan without trials.

    Episodes are independent, trials inside one need not be: a model that spells a call wrong may do so all along a chain. So
    the interval is Wilson's for the effective number of episodes, (sum of trials)^2 / sum of trials^2 (Kish 1965): as if all
    trials of an episode came out alike, which is the widest that clustering can make it. With one trial an episode that is
    their number. Lengths are drawn in fixed numbers, which can only narrow it.
    """

    hits: Callable[[Played], int]
    trials: Callable[[Played], int] = lambda p: 1

    def __call__(self, plays: Plays) -> float:
        every = [p for some in plays.values() for p in some]
        trials = sum(map(self.trials, every))
        return sum(map(self.hits, every)) / trials if trials else math.nan

    def interval(self, plays: Plays) -> tuple[float, float]:
        trials = np.array([self.trials(p) for some in plays.values() for p in some], float)
        return interval(self(plays), trials.sum() ** 2 / max((trials**2).sum(), 1))


MEASURES: dict[str, Callable[[Plays], float]] = {
    "step_accuracy": step_accuracy,
    "half_horizon": half_horizon,
    "tokens_per_answer": tokens_per_answer,
    "tokens_per_correct": tokens_per_correct,
    "loops": Share(lambda p: p.loops),
    "overthought": Share(lambda p: p.overthought),
    "valid_calls": Share(lambda p: p.valid_calls, lambda p: p.calls),
    "out_of_replies": Share(lambda p: p.stopped == "limit"),
}
"""valid_calls: of attempted ones, those that name a declared tool with fitting arguments."""


def bounds(plays: Plays, measure: Callable[[Plays], float]) -> tuple[float, float]:
    """95 % interval of a measure: a share's own, else a bootstrap over chains. Where all chains agree about a step a
    bootstrap has no width; then it is Wilson's for the steps tried, of which a chain can fail only one."""
    if isinstance(measure, Share):
        return measure.interval(plays)
    low, high = bootstrap(plays, measure)
    return interval(step_accuracy(plays), _steps(plays)[1]) if measure is step_accuracy and low == high else (low, high)


def bootstrap(plays: Plays, measure: Callable[[Plays], float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval over resampled problems, length by length (Efron 1979)."""
    rng = np.random.default_rng(seed)
    values = [
        measure({n: [some[i] for i in rng.integers(0, len(some), len(some))] for n, some in plays.items()})
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two generations differ; None if they are the same."""
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return None if at == len(one) == len(other) else at


def divergence(plays: Plays, reference: Plays) -> dict[str, float | None]:
    """Share of generations that equal the reference's from end to end, and the median place of the first difference
    among the others."""
    found = [first_difference(a.ids, b.ids) for n in plays for a, b in zip(plays[n], reference[n], strict=True)]
    places = [at for at in found if at is not None]
    return {"same_share": 1 - len(places) / len(found), "median_first_difference": float(np.median(places)) if places else None}
