"""Incremental training: batches that mix the new examples with replay of the old ones.

A model that is trained on new examples alone forgets what it knew (McCloskey and Cohen 1989). Here a part of
every batch is replay, both parts with all classes in equal numbers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ReplayBatch:
    """Row numbers into the old examples and into the new ones, int64."""

    old: Rows
    new: Rows


def replay_batches(
    old_labels: ArrayLike,
    new_labels: ArrayLike,
    *,
    steps: int,
    batch: int,
    seed: int,
    weights: ArrayLike | None = None,
) -> Iterator[ReplayBatch]:
    """`steps` batches of `batch` rows, half old and half new, each half with all classes in equal numbers.

    `weights` (one a new example, positive) say how often a new example is drawn, compared with the others of
    its class: the loss of the model that is to learn it, for instance. The same seed gives the same batches;
    nothing secret hangs on it. Raises `ValueError` when a class is missing from the old or the new examples,
    or when the batch can't be cut into equal parts.
    """
    old, new = np.asarray(old_labels), np.asarray(new_labels)
    classes = np.unique(old)
    share = batch // (2 * len(classes))
    if share < 1 or share * 2 * len(classes) != batch:
        raise ValueError(
            f"a batch of {batch} can't be cut into equal parts of {len(classes)} classes, old and new"
        )
    weight = np.ones(len(new)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(weight) != len(new) or (len(new) and not np.all(weight > 0)):
        raise ValueError("there is one positive weight for each new example")
    pools = []
    for one in classes:
        olds, news = np.flatnonzero(old == one), np.flatnonzero(new == one)
        if not len(news):
            raise ValueError(f"no new example has class {one}; forward some of every class")
        pools.append((olds, news, np.cumsum(weight[news]) / weight[news].sum()))
    for step in range(steps):
        old_rows, new_rows = [], []
        for one, (of_old, of_new, cumulated) in enumerate(pools):
            draws = _uniform(seed, step, one, 2 * share)
            old_rows.append(of_old[(draws[:share] * len(of_old)).astype(np.int64)])
            new_rows.append(
                of_new[np.minimum(np.searchsorted(cumulated, draws[share:], "right"), len(of_new) - 1)]
            )
        yield ReplayBatch(np.concatenate(old_rows), np.concatenate(new_rows))


def _uniform(seed: int, step: int, part: int, count: int) -> NDArray[Any]:
    """`count` numbers in [0, 1) that depend on nothing but the arguments."""
    words = hashlib.shake_256(f"replay/{seed}/{step}/{part}".encode()).digest(4 * count)
    return np.frombuffer(words, "<u4") / 2.0**32
