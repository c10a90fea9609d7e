"""The accept gate: a member takes a new model only if it isn't worse than its own, on its own data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from blindsum.client.layout import StateDict, framework_of, portable, undress
from blindsum.client.private_files import read_private, write_private
from blindsum.crypto.errors import ParameterRefused

Model = TypeVar("Model", bound=StateDict)


@dataclass(frozen=True)
class Decision:
    """What the gate did with an offered model, and the two scores on the member's validation data."""

    taken: bool
    offered: float
    own: float | None

    def __str__(self) -> str:
        if self.own is None:
            return f"taken: the first model, {self.offered:.4f} on the local validation data"
        said = "taken" if self.taken else "kept its own"
        return f"{said}: offered {self.offered:.4f}, own {self.own:.4f} on the local validation data"


class AcceptGate(Generic[Model]):
    """Keeps the model that this member uses, and lets a new one in only if it scores at least as high.

    `score(state)` is higher for better, on validation data that stay here and that no training step used.
    `tolerance` is how much lower a new model may score and still be taken: with few validation images
    scores are coarse, so a small site that trusts the federation sets one. What the gate decided is never
    sent anywhere.
    """

    def __init__(
        self, score: Callable[[Model], float], own: Model | None = None, *, tolerance: float = 0.0
    ) -> None:
        if not math.isfinite(tolerance) or tolerance < 0:
            raise ParameterRefused(f"a tolerance is zero or more, not {tolerance}")
        self._score = score
        self._tolerance = tolerance
        self._own = own
        self._own_score = None if own is None else self._scored(own)

    @property
    def state(self) -> Model:
        """The model in use. Raises `ParameterRefused` before there is one."""
        if self._own is None:
            raise ParameterRefused("the gate has no model yet; offer one first")
        return self._own

    def offer(self, new: Model) -> Decision:
        """Take `new` if it isn't worse than the model in use. A score that isn't a number keeps the own one.

        Raises `ParameterRefused` if the very first model's score isn't a number.
        """
        own = self._own_score
        offered = float(self._score(new))
        if own is None and not math.isfinite(offered):
            raise ParameterRefused("the first model's score isn't a number; check the validation data")
        taken = own is None or (math.isfinite(offered) and offered >= own - self._tolerance)
        if taken:
            self._own, self._own_score = new, offered
        return Decision(taken, offered, own)

    def save(self, path: Path) -> None:
        """Write the model in use, readable by its owner only; whole or not at all."""
        file = BytesIO()
        arrays: dict[str, Any] = {f"tensor {name}": value for name, value in portable(self.state).items()}
        np.savez(file, allow_pickle=False, **arrays)
        write_private(path, file.getvalue())

    @classmethod
    def load(
        cls, path: Path, score: Callable[[Model], float], like: Model, *, tolerance: float = 0.0
    ) -> Self:
        """A gate with the model that `save` wrote, as values of the kind of `like`.

        Raises `FolderError` for a missing file or one that others may read, `ParameterRefused` for one that
        isn't a model of the same tensors as `like`.
        """
        try:
            with np.load(BytesIO(read_private(path)), allow_pickle=False) as stored:
                arrays = {name.removeprefix("tensor "): stored[name] for name in stored.files}
        except (ValueError, OSError, EOFError):
            raise ParameterRefused(f"{path} isn't a model that the gate saved") from None
        shapes = {name: value.shape for name, value in portable(like).items()}
        if {name: value.shape for name, value in arrays.items()} != shapes:
            raise ParameterRefused(f"{path} holds a model of other tensors")
        restored: Any = undress(arrays, framework_of(like))
        return cls(score, restored, tolerance=tolerance)

    def _scored(self, state: Model) -> float:
        value = float(self._score(state))
        if not math.isfinite(value):
            raise ParameterRefused("the own model's score isn't a number; check the validation data")
        return value
