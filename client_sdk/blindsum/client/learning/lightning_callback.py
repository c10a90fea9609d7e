"""A Lightning callback: each training epoch is one round of the federation. Needs the `lightning` extra.

Trainer(callbacks=[FederatedRounds(member, examples=len(data))], max_epochs=-1).fit(module, loader)
"""

from collections.abc import Iterator
from typing import Any

import lightning
from blindsum.client.member import Member, Round


class FederatedRounds(lightning.Callback):
    """Starts each epoch from the federation's weights, submits after it, stops when the plan is finished.

    Metrics that the plan declares are taken from what the module logged under the same name.
    """

    def __init__(self, member: Member, *, examples: int) -> None:
        self._rounds: Iterator[Round] = member.rounds()
        self._examples = examples
        self._round: Round | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for the next round and take its weights."""
        self._round = self._round or next(self._rounds, None)
        if self._round is None:
            trainer.should_stop = True
        else:
            pl_module.load_state_dict(self._round.weights(), strict=False)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Submit what the epoch learnt."""
        rnd, self._round = self._round, None
        if rnd is not None:
            wanted = {metric.name for metric in rnd.plan.encoding.metrics}
            logged: dict[str, Any] = {k: float(v) for k, v in trainer.callback_metrics.items() if k in wanted}
            rnd.submit(pl_module.state_dict(), examples=self._examples, metrics=logged)
            self._round = next(self._rounds, None)
            trainer.should_stop = self._round is None
