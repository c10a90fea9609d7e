"""Mean, spread and histogram of the members' accuracy, from sums that name nobody."""

import math

import numpy as np
import pytest
from blindsum.client.learning import FairnessReport, fairness_metrics, fairness_ranges
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import EncodingError, ParameterRefused

ACCURACY = {"member-1": 0.91, "member-2": 0.70, "member-3": 0.85}


def test_mean_and_spread_come_out_of_the_secure_sum():
    with Federation(3, model=small_model(), metrics=fairness_ranges()) as federation:

        def app(member):
            for rnd in member.rounds():
                rnd.submit(
                    rnd.weights(),
                    examples=int(member.name[-1]),
                    metrics=fairness_metrics(ACCURACY[member.name]),
                )
            return member.receipts()[-1]

        receipts = federation.run(app)
    for receipt in receipts.values():
        report = FairnessReport.of(receipt.metrics)
        assert report.mean == pytest.approx(np.mean(list(ACCURACY.values())), abs=1e-5)
        assert report.spread == pytest.approx(np.std(list(ACCURACY.values())), abs=1e-4)
        assert report.histogram == ()
    assert "-11.0 points over training alone" in report.standing(0.70, 0.81)


def test_equal_members_have_no_spread():
    metrics = {"accuracy": 0.9, "accuracy squared": 0.81 - 1e-9}
    assert FairnessReport.of(metrics).spread == 0.0


@pytest.mark.parametrize("accuracy", [0.0, 0.1999, 0.5, 0.99, 1.0])
def test_a_histogram_counts_each_member_once(accuracy):
    ranges = fairness_ranges(bins=5, cohort_min=20)
    given = fairness_metrics(accuracy, bins=5)
    assert set(given) == set(ranges)
    histogram = FairnessReport.of(given).histogram
    assert sum(histogram) == 1.0
    assert histogram[min(math.floor(accuracy * 5), 4)] == 1.0


def test_a_histogram_of_a_small_cohort_is_refused():
    with pytest.raises(ParameterRefused, match="nearly the list"):
        fairness_ranges(bins=5, cohort_min=19)
    with pytest.raises(ParameterRefused, match="2 to 20 bins"):
        fairness_ranges(bins=1, cohort_min=50)


def test_what_is_no_accuracy_is_refused():
    with pytest.raises(EncodingError, match="accuracy"):
        fairness_metrics(91.0)
    with pytest.raises(ParameterRefused, match="declares no metric"):
        FairnessReport.of({"loss": 1.0})
