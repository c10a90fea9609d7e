"""How a member learns around the secure sum: local strategies, the accept gate, fairness, normalisation.

Everything here is a sum or stays at the member. What would need single updates at the server (Krum, median,
trimmed mean) can't exist under secure aggregation and is refused with that reason.
"""

from blindsum.client.learning.accept_gate import AcceptGate, Decision
from blindsum.client.learning.fairness import FairnessReport, fairness_metrics, fairness_ranges
from blindsum.client.learning.local_strategy import LocalStrategy, local_strategy

__all__ = [
    "AcceptGate",
    "Decision",
    "FairnessReport",
    "LocalStrategy",
    "fairness_metrics",
    "fairness_ranges",
    "local_strategy",
]
