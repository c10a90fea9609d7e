"""Which examples a site proposes to forward.

Novelty raises the flag for a site or a class. Then most of the quota is a random sample, spread evenly over
the classes, and the rest the most doubtful ones; picking the most novel ones would send the oddities and
teach the model those. Where no flag is up, only the most doubtful ones are proposed, at most the same few.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from blindsum.client.hard_examples.scores import Features, Novelty, doubt, of_rows
from blindsum.crypto.primitives.derivation import Random, labelled_hash, system_random
from numpy.typing import ArrayLike, NDArray

RANDOM_SHARE: Final = 0.8


@dataclass(frozen=True)
class Proposal:
    """Rows to propose, in order, and why: `flagged` are the classes with a flag up, `site_flagged` the whole
    site. `doubts` and `novelties` are the scores of the rows.
    """

    rows: tuple[int, ...]
    reasons: tuple[str, ...]
    doubts: tuple[float, ...]
    novelties: tuple[float, ...]
    site_flagged: bool
    flagged: tuple[int, ...]


def propose(
    logits: ArrayLike,
    features: Features,
    labels: ArrayLike,
    novelty: Novelty,
    *,
    quota: int,
    random_share: float = RANDOM_SHARE,
    random: Random = system_random,
) -> Proposal:
    """At most `quota` rows of a site's labelled examples. `logits` (n,) or (n, classes), `features` (n, d) in
    the groups that `novelty` knows, `labels` (n,) of any integer dtype. `random` draws the seed of the
    sample.

    Raises `ValueError` for parts of different lengths or a quota below 1.
    """
    classes, doubts, scores = np.asarray(labels), doubt(logits), novelty.score(features)
    if not len(doubts) == len(scores) == len(classes):
        raise ValueError(f"{len(doubts)} logits, {len(scores)} features and {len(classes)} labels")
    if quota < 1:
        raise ValueError(f"a quota is at least 1, not {quota}")
    present = np.unique(classes)
    site = novelty.is_flagged(features)
    flagged = [int(one) for one in present if site or novelty.is_flagged(of_rows(features, classes == one))]
    few = quota - int(random_share * quota)
    sample = _spread(classes, flagged, quota - few, random(32)) if flagged else []
    doubtful = [int(row) for row in np.argsort(-doubts, kind="stable") if row not in sample][:few]
    rows = [*sample, *doubtful]
    reasons = ["random sample of a flagged class"] * len(sample) + ["most doubtful"] * len(doubtful)
    return Proposal(
        tuple(rows),
        tuple(reasons),
        tuple(float(doubts[row]) for row in rows),
        tuple(float(scores[row]) for row in rows),
        site,
        tuple(flagged),
    )


def _spread(classes: NDArray[Any], of: list[int], count: int, seed: bytes) -> list[int]:
    """`count` rows, the classes taking turns, in an order that only the seed decides."""
    queues = []
    for one in of:
        rows = [int(row) for row in np.flatnonzero(classes == one)]
        queues.append(sorted(rows, key=lambda row: labelled_hash("sample", seed, row.to_bytes(8, "little"))))
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen
