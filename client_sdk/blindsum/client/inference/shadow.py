"""Whether the cloud helps at this site: counted on doubtful images whose truth became known."""

from collections import deque
from dataclasses import dataclass

LEAST_NET = 2


@dataclass(frozen=True)
class ShadowReport:
    """What shadow evaluation found on labelled local images; accuracies and shares are fractions of 1.

    `gain` is what the cloud would add to the edge's accuracy; `helps` whether that is more than chance may
    give.
    """

    images: int
    sent: float
    edge: float
    cascade: float
    helps: bool

    @property
    def gain(self) -> float:
        """Accuracy of the cascade less that of the edge alone."""
        return self.cascade - self.edge


class Shadow:
    """Counts, over the last `window` doubtful images with a known truth, where the cloud was right and the
    edge

    wrong (won) and the other way round (lost). The cloud helps while it has won at least two more than it
    lost, and by at least one standard error of that count, sqrt(won + lost). Before the first image it is
    on trial.
    """

    def __init__(self, window: int = 500) -> None:
        self._seen: deque[int] = deque(maxlen=window)
        self.measured = False

    def record(self, edge_right: bool, cloud_right: bool) -> None:
        """One more doubtful image."""
        self._seen.append(int(cloud_right) - int(edge_right))
        self.measured = True

    def forget(self) -> None:
        """Begin anew: after a change of the edge's model or the cloud's."""
        self._seen.clear()
        self.measured = False

    @property
    def helps(self) -> bool:
        """Whether doubtful images should go to the cloud."""
        if not self.measured:
            return True
        net, decided = sum(self._seen), sum(map(abs, self._seen))
        return bool(net >= LEAST_NET and net * net >= decided)
