"""scikit-learn's linear models in a federation."""

import numpy as np
import pytest
from blindsum.client.learning.linear_models import load_state, start_state, state_of
from blindsum.client.testing import Federation
from blindsum.crypto.errors import EncodingError

sklearn = pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier  # noqa: E402

WEIGHTS = np.array([1.5, -2.0, 0.5])


def data(seed, count=60):
    stream = np.random.default_rng(seed)
    features = stream.normal(size=(count, 3))
    return features, (features @ WEIGHTS + stream.normal(scale=0.2, size=count) > 0).astype(int)


def test_a_classifier_trained_together_fits_everyone_s_data():
    with Federation(3, model=start_state(3, classes=2), rounds=3) as federation:

        def app(member):
            estimator = SGDClassifier(loss="log_loss", random_state=0, learning_rate="constant", eta0=0.05)
            features, labels = data(int(member.name[-1]))
            for rnd in member.rounds():
                load_state(estimator, rnd.weights(), classes=[0, 1])
                estimator.partial_fit(features, labels, classes=[0, 1])
                rnd.submit(state_of(estimator), examples=len(labels))
            load_state(estimator, member.latest_state())
            return estimator

        found = federation.run(app)
    unseen, labels = data(99, 500)
    coefficients = [estimator.coef_.tolist() for estimator in found.values()]
    assert coefficients[0] == coefficients[1] == coefficients[2]
    assert found["member-1"].score(unseen, labels) > 0.93


@pytest.mark.parametrize("classes", [2, 3])
def test_a_state_goes_into_an_unfitted_classifier(classes):
    features, _ = data(1)
    labels = np.arange(len(features)) % classes
    fitted = LogisticRegression().fit(features, labels)
    fresh = LogisticRegression()
    load_state(fresh, state_of(fitted), classes=range(classes))
    assert (fresh.predict(features) == fitted.predict(features)).mean() > 0.99
    assert state_of(fitted)["coef"].shape == start_state(3, classes)["coef"].shape


def test_a_regression_needs_no_classes():
    features, labels = data(1)
    fitted = Ridge().fit(features, labels)
    fresh = Ridge()
    load_state(fresh, state_of(fitted))
    assert fresh.predict(features) == pytest.approx(fitted.predict(features), abs=1e-5)


def test_what_doesn_t_fit_is_refused():
    with pytest.raises(EncodingError, match="fit it first"):
        state_of(LogisticRegression())
    with pytest.raises(EncodingError, match="labels don't fit"):
        load_state(LogisticRegression(), start_state(3, classes=3), classes=[0, 1])
    with pytest.raises(EncodingError, match="no linear model"):
        start_state(0)
