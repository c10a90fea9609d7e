"""What each member does with the shared model: the strategies of personalised learning that are sums.

The owner chooses one and signs it with the plan; every member reads it from there:

    owner.start_plan("lungs", model.state_dict(), rounds=25, **local_strategy("fedprox", 0.1).plan(model))
    ...
    learner = Learner(LocalStrategy.of(rnd.plan), model)           # blindsum.client.learning.learner

Sources: McMahan et al., AISTATS 2017 (FedAvg); Li et al., MLSys 2020 (FedProx); Arivazhagan et al.,
arXiv:1912.00818 (FedPer); Li et al., ICLR 2021 (FedBN); Li et al., ICML 2021 (Ditto); Li et al., ICLR 2020
(q-FFL).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Self

from blindsum.client.layout import StateDict, shared_names
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.strategy import NEEDS_SINGLE_UPDATES

NAME_SETTING: Final = "client.strategy"
STRENGTH_SETTING: Final = "client.strength"
WEIGHT_STEPS: Final = 1 << 20
"""A q-FFL weight is a whole number of steps of its largest value over this."""


@dataclass(frozen=True)
class _Kind:
    text: str
    strength: str = ""
    """What `strength` means; empty where there is none."""
    default: float = 0.0
    local: bool = False
    """Whether some parameters stay at the members."""


_KINDS: Final[dict[str, _Kind]] = {
    "fedavg": _Kind("one shared model"),
    "fedprox": _Kind("one shared model; local training is pulled towards it", "mu of the proximal term", 0.1),
    "fedper": _Kind("a shared body, a head of each member's own", local=True),
    "fedbn": _Kind("shared weights, normalisation layers of each member's own", local=True),
    "ditto": _Kind("one shared model, and a personal one pulled towards it", "lambda of the pull", 0.1),
    "qffl": _Kind("one shared model; members with a high loss count more", "q", 1.0),
    "fine_tuning": _Kind("one shared model, trained on at each member after the last round"),
}


@dataclass(frozen=True)
class LocalStrategy:
    """A strategy and its one number: mu for fedprox, lambda for ditto, q for qffl; 0 for the others.

    Made by `local_strategy` or, at a member, by `LocalStrategy.of`.
    """

    name: str
    strength: float = 0.0

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The strategy that the owner signed with the plan; "fedavg" if the plan names none.

        Raises `ParameterRefused` for one that this version doesn't know.
        """
        name = plan.settings.get(NAME_SETTING, "fedavg")
        text = plan.settings.get(STRENGTH_SETTING)
        try:
            strength = None if text is None else float(text)
        except ValueError:
            raise ParameterRefused(f"{STRENGTH_SETTING} = {text!r} isn't a number") from None
        return cls(*_checked(name, strength))

    def plan(self, model: StateDict | Any, *, local: Sequence[str] = ()) -> dict[str, Any]:
        """Arguments for `Owner.start_plan`: what is shared, how members are weighed, the strategy's name.

        `model` is a state dict or a torch module. `local` are name patterns of what stays at the members
        under fedper; under fedbn they are found from the module's normalisation layers unless given.

        Raises `ParameterRefused` where the strategy needs patterns and has none, or has no use for them;
        `EncodingError` for a pattern that no tensor matches.
        """
        state = model.state_dict() if hasattr(model, "state_dict") else model
        kind = _KINDS[self.name]
        if local and not kind.local:
            raise ParameterRefused(f"{self.name} keeps nothing local; fedper and fedbn do")
        if self.name == "fedbn" and not local:
            local = normalisation_parameters(model)
        if kind.local and not local:
            raise ParameterRefused(f"{self.name} needs the name patterns of what stays local, as ['head.*']")
        arguments: dict[str, Any] = {"settings": self._settings()}
        if local:
            shared_names(state, local)
            kept = [name for name in state if any(fnmatchcase(name, pattern) for pattern in local)]
            arguments["shared"] = tuple(name for name in shared_names(state) if name not in kept)
            if not arguments["shared"]:
                raise ParameterRefused("with these patterns everything stays local; nothing is left to share")
        if self.name == "qffl":
            arguments |= {"weighting": "size", "max_examples": WEIGHT_STEPS}
        return arguments

    def penalises(self) -> bool:
        """Whether the loss that is shared has a proximal term."""
        return self.name == "fedprox"

    def _settings(self) -> dict[str, str]:
        settings = {NAME_SETTING: self.name}
        if _KINDS[self.name].strength:
            settings[STRENGTH_SETTING] = repr(self.strength)
        return settings


def local_strategy(name: str, strength: float | None = None) -> LocalStrategy:
    """The strategy of a name: fedavg, fedprox, fedper, fedbn, ditto, qffl or fine_tuning.

    Raises `ParameterRefused` for unknown names, for a strength out of range, and with the reason for
    strategies that need single updates.
    """
    return LocalStrategy(*_checked(name, strength))


def strategies() -> Mapping[str, str]:
    """Every strategy's name, and what it does in a few words."""
    return {name: kind.text for name, kind in _KINDS.items()}


def normalisation_parameters(model: Any) -> tuple[str, ...]:
    """Names of the parameters of a torch module's normalisation layers: batch, group, layer or instance.

    Raises `ParameterRefused` for a model without any, and for something that isn't a torch module.
    """
    if not hasattr(model, "named_modules"):
        raise ParameterRefused(
            "a state dict doesn't say which layers normalise; give the torch module, or local=[...] patterns"
        )
    names = tuple(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "Norm" in type(module).__name__
        for name, _ in module.named_parameters(recurse=False)
    )
    if not names:
        raise ParameterRefused("the model has no normalisation layer with parameters; use fedavg or fedper")
    return names


def q_weight(
    q: float,
    loss: float,
    update_norm_squared: float,
    learning_rate: float,
    largest: float,
    smallest_steps: int = 1,
) -> tuple[float, int]:
    """How q-FFL scales a member's update, and its weight in whole steps of `largest` / 2^20.

    With F the loss of the shared model here, d the update (w_k - w) and L = 1 / learning rate, q-FFL sums
    D_k = F^q L (w - w_k) and h_k = q F^(q-1) ||L d||^2 + L F^q, and moves by - sum D_k / sum h_k (Li et al.,
    ICLR 2020, algorithm 2). That is the weighted mean of updates F^q L d / h_k with weights h_k, so the one
    secure sum of every strategy serves it. Here all is divided by L.

    The weight is rounded to steps first and the scale made from the rounded one, so the numerator stays
    exact; h above `largest` counts as `largest`, and below `smallest_steps` as that: the plan's ratio of
    weights allows no less.

    Raises `ParameterRefused` for a loss that isn't positive and finite.
    """
    if not math.isfinite(loss) or loss <= 0:
        raise ParameterRefused(f"q-FFL needs a positive, finite loss, not {loss}")
    strength = loss**q
    h = q * loss ** (q - 1) * update_norm_squared / learning_rate + strength
    steps = min(max(round(h / largest * WEIGHT_STEPS), smallest_steps), WEIGHT_STEPS)
    return strength / (steps / WEIGHT_STEPS * largest), steps


def _checked(name: str, strength: float | None) -> tuple[str, float]:
    if name in NEEDS_SINGLE_UPDATES:
        raise ParameterRefused(
            f"{name} compares the members' single updates, and under secure aggregation nobody has them: "
            f"only sums exist. Choose one of {', '.join(_KINDS)}"
        )
    if name not in _KINDS:
        raise ParameterRefused(f"there is no strategy {name!r}; choose one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    if not kind.strength:
        if strength:
            raise ParameterRefused(f"{name} has no strength to set")
        return name, 0.0
    value = kind.default if strength is None else float(strength)
    if not math.isfinite(value) or not 0 <= value <= 1e6:
        raise ParameterRefused(f"{name}: {kind.strength} = {value} isn't within 0..1000000")
    return name, value
