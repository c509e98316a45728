"""What served answers say of other numbers of draft tokens, and of the speed to expect.

A server that drafts K tokens a step accepts a of them and goes on behind the next token, so where it drafts
depends on K: the first K' < K positions of its drafts are *not* what a server with K' would show. In an easy
stretch it drafts every K + 1 tokens, in a hard one at every token, so cutting its drafts counts easy places
too rarely (acceptance length 1.55 instead of 1.61 at one token from six, with the demo's released layer).

`served_counts` walks over the answer with K' instead. Each of its tokens was an accepted draft or the
target's own; the walk accepts up to K' drafts that were accepted, and takes a token behind a wholly accepted
draft, which nobody drafted, for accepted where the next draft began well. What it assumes, and cannot know: a
token is accepted as well from a nearer state, and no less often refused. So figures at a number of tokens
that was served are counted, the others estimated: with the demo's layers within 0.03 of the count. The
offline evaluator (`train/evaluate.py`) has every state and estimates none.

Legend: N documents, T temperatures, K numbers of draft tokens, S draft steps.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.acceptance import ACCEPTED, TRIED

__all__ = ["recommend", "served_counts", "speedups"]

OWN, DRAFTED, BONUS = range(3)


def served_counts(rounds: Mapping[int, Mapping[str, Any]], num_steps_max: int) -> np.ndarray:
    """Counts of each answer at every number of draft tokens, for `configs.acceptance.tables`.

    vLLM goes on with a draft behind the end of an answer, and its own figures count what it accepts there,
    which nobody gets. Here a draft counts for the steps that lie in the answer, as in the offline evaluator.

    Args:
        rounds: by the number of draft tokens, `outputs` and `accepted` of each answer, as
            `pipeline.measure.measure` returns them; the greatest is at least `num_steps_max`.
        num_steps_max: K.

    Returns:
        float64 [N, K, 2, S]: counted where that number was served, else from the next greater one.
    """
    documents = len(next(iter(rounds.values()))["outputs"])
    counts = np.zeros((documents, num_steps_max, 2, num_steps_max))
    for drafts in range(1, num_steps_max + 1):
        served = min(k for k in rounds if k >= drafts)
        answers = zip(rounds[served]["outputs"], rounds[served]["accepted"], strict=True)
        for document, (output, accepted) in enumerate(answers):
            # the first token comes of reading the prompt
            length = len(output) - 1
            found = np.array(accepted if served == drafts else _walk(accepted, served, drafts, length), int)
            left = length - np.cumsum(found + 1) + found + 1
            ahead = np.arange(drafts)
            # step s is tried where all before it were accepted
            tried = (ahead < left[:, None]) & (ahead <= found[:, None])
            counts[document, drafts - 1, TRIED, :drafts] = tried.sum(0)
            counts[document, drafts - 1, ACCEPTED, :drafts] = (tried & (ahead < found[:, None])).sum(0)
    return counts


def _walk(accepted: Sequence[int], served: int, drafts: int, length: int) -> list[int]:
    """Draft tokens accepted in each step with fewer of them than were served, in an answer so long."""
    kinds = []
    for n in accepted:
        kinds += [DRAFTED] * n + [BONUS if n == served else OWN]
    taken = [
        kind == DRAFTED or (kind == BONUS and i + 1 < len(kinds) and kinds[i + 1] == DRAFTED)
        for i, kind in enumerate(kinds)
    ]
    taken = taken[:length]
    found, at = [], 0
    while at < len(taken):
        n = 0
        while n < drafts and at + n < len(taken) and taken[at + n]:
            n += 1
        found.append(n)
        at += n + 1
    return found


def speedups(
    rows: Sequence[Mapping[str, Any]],
    plain: Mapping[str, float],
    drafted: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Tokens a second over those of the target alone, expected at each number of draft tokens.

    A step with K draft tokens takes as long as measured; between the numbers measured, none included, its
    time goes by a straight line.

    Args:
        rows: of `by_num_steps` in `configs.acceptance.tables`, at one temperature.
        plain: seconds of a step of the target alone, by the number of requests at a time.
        drafted: the same by the number of draft tokens.

    Returns:
        `num_steps`, `temperature`, `concurrency`, `speedup` for every concurrency timed both ways.
    """
    found = []
    for concurrency in sorted(set(plain).intersection(*drafted.values()), key=int):
        steps = [0, *sorted(map(int, drafted))]
        seconds = [plain[concurrency], *(drafted[str(k)][concurrency] for k in steps[1:])]
        for row in rows:
            cost = float(np.interp(row["num_steps"], steps, seconds))
            found.append(
                {key: row[key] for key in ("num_steps", "temperature")}
                | {"concurrency": int(concurrency), "speedup": row["acceptance_length"] * seconds[0] / cost}
            )
    return found


def recommend(name: str, rows: Sequence[Mapping[str, Any]], temperature: float) -> str:
    """The number of draft tokens to serve with, in one sentence.

    Args:
        name: of the draft.
        rows: from `speedups`.
        temperature: theirs.
    """
    draft = f"the {Path(name).name} draft"
    if not rows:
        return (
            f"No step of {draft} was timed: take the number of draft tokens that `bench-serve` finds fastest."
        )
    by_number: dict[int, dict[int, float]] = {}
    for row in rows:
        by_number.setdefault(row["num_steps"], {})[row["concurrency"]] = row["speedup"]
    # of the speed-ups at all concurrencies the geometric mean
    best = max(by_number, key=lambda k: float(np.mean(np.log(list(by_number[k].values())))))
    found, in_what = by_number[best], f"(tokens a second at temperature {temperature:g})"
    if max(found.values()) <= 1:
        slower = _each({c: f"{1 - speedup:.0%}" for c, speedup in found.items()}, " slower than")
        return (
            f"Serve without {draft} on this machine, where no number of draft tokens pays: with {best} a"
            f" step, its best, it is expected to be {slower} {in_what}."
        )
    tokens = f"{best} draft token{'s' if best > 1 else ''}"
    times = _each({c: f"{speedup:.2f} times" for c, speedup in found.items()}, " as fast as")
    behind = [f"{c:,}" for c, speedup in found.items() if speedup < 1]
    alone = f"; with {' and '.join(behind)} the target alone is faster" if behind else ""
    return f"Serve {draft} with {tokens} a step: it is expected to be {times} {in_what}{alone}."


def _each(values: Mapping[int, str], compared: str) -> str:
    """A value for each number of requests at a time, in words."""
    (fewest, first), *others = values.items()
    requests = f"{fewest:,} request{'s' if fewest > 1 else ''} at a time"
    said = [
        f"{first}{compared} the target alone with {requests}",
        *(f"{value} with {c:,}" for c, value in others),
    ]
    return " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
