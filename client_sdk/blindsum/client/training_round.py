"""A round as the app sees it: the weights to start from, and what it learnt."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from blindsum.client.layout import StateDict, dress, framework_of, local_parts, update_of
from blindsum.client.receipts import RoundReceipt
from blindsum.client.round_session import Contribution, RoundSession
from blindsum.crypto.encoding.vector import VectorPlan
from blindsum.crypto.errors import RoundAborted
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.training_state import TrainingState

if TYPE_CHECKING:
    from blindsum.client.member import Member

_log = logging.getLogger("blindsum.client")


class Round:
    """A round that waits for this member's update. Made by `Member.rounds`."""

    def __init__(self, member: "Member", session: RoundSession, state: TrainingState, again: bool) -> None:
        self._member = member
        self._session = session
        self._state = state
        self._submitted = False
        self.again = again
        """The round before from this very state was aborted late: train on fresh batches."""

    @property
    def number(self) -> int:
        """The federation's number of this round; aborted rounds use numbers up."""
        return self._session.number

    @property
    def index(self) -> int:
        """Which round of the plan this is, from 1."""
        return self._session.bound.header.state_round + 1

    @property
    def total(self) -> int:
        """How many rounds the plan has."""
        return self._session.plan.rounds

    @property
    def plan(self) -> Plan:
        """The plan, as the owner signed it."""
        return self._session.plan

    @property
    def he_parameters(self) -> str:
        """The name of the HE parameter set that the round is under; empty in masking."""
        return self._session.terms.he_parameters

    @property
    def settings(self) -> Mapping[str, str]:
        """The plan's settings for apps."""
        return self._session.plan.settings

    def weights(self, like: StateDict | None = None) -> dict[str, Any]:
        """The state dict to start from, in the plan's kind (torch tensors or numpy arrays).

        Shared tensors are the federation's. The others (a local head, integer buffers) come from `like`
        if given, else from what this member last submitted; before its first submit there are none.
        """
        framework = self._member.framework_for(self._session.plan) if like is None else framework_of(like)
        layout = self._state.layout
        shared = dress(layout, self._state.tensors(), framework)
        if like is not None:
            return {name: shared.get(name, value) for name, value in like.items()} | {
                name: value for name, value in shared.items() if name not in like
            }
        return shared | self._member.local_tensors(framework, set(layout.names))

    def submit(
        self,
        state: StateDict,
        *,
        examples: int,
        metrics: Mapping[str, float] | None = None,
    ) -> RoundReceipt:
        """Send what was learnt, and wait until the members agree on the next state.

        `state` is the model after training; of it, the plan's shared tensors are sent (as a difference to
        `weights`), the others stay here. `examples` sets the weight, `metrics` are those that the plan
        declares; both ride inside the sum.

        Raises `EncodingError` naming what can't be encoded (nothing was sent; submit again), `RoundAborted`
        when the app has to train again, `SumCheckFailed` or `OpeningFailed` when the sum is false (nothing
        is output), `ServerViolation` and others when the aggregator lies.
        """
        if self._submitted:
            raise RoundAborted(self.number, "this round's update was submitted already; go on with rounds()")
        layout = self._state.layout
        contribution = Contribution(
            update_of(layout, state, self._state.values),
            examples,
            dict(metrics or {}),
            self._member.rounding_seed(self._session),
        )
        plan = VectorPlan.of(self._session.plan, layout)
        # The round's own key isn't known before the upload; this one only proves that encoding works.
        contribution.encoder(plan, self._state.exponents, bytes(32), self._member.name)
        self._submitted = True
        receipt = self._member.contribute(self._session, self._state, contribution)
        self._member.keep_local(local_parts(state, layout))
        return receipt

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, RoundAborted):
            _log.warning("%s", error)
            return True
        return False

    def __repr__(self) -> str:
        return f"<Round {self.number} of {self._member.name}, {self.index} of {self.total}>"
