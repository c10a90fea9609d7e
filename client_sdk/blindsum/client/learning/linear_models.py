"""scikit-learn's linear models as state dicts: LogisticRegression, SGDClassifier, Ridge and their kin.

    state = state_of(estimator)                       # {"coef": ..., "intercept": ...}
    for rnd in member.rounds():
        load_state(estimator, rnd.weights())
        estimator.partial_fit(features, labels)
        rnd.submit(state_of(estimator), examples=len(labels))

Needs scikit-learn only through the estimator that the app brings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from blindsum.crypto.errors import EncodingError
from numpy.typing import NDArray


def start_state(features: int, classes: int = 0) -> dict[str, NDArray[np.float32]]:
    """The zero state of a model over so many features; `classes` 0 for a regression, 2 or more otherwise.

    Raises `EncodingError` for no feature or one class.
    """
    if features < 1 or classes == 1 or classes < 0:
        raise EncodingError("coef", f"{features} features and {classes} classes make no linear model")
    rows = 1 if classes == 2 else classes
    shape = (rows, features) if rows else (features,)
    return {"coef": np.zeros(shape, np.float32), "intercept": np.zeros(max(rows, 1), np.float32)}


def state_of(estimator: Any) -> dict[str, NDArray[np.float32]]:
    """Coefficients and intercept of a fitted linear estimator, float32.

    Raises `EncodingError` for an estimator without them: not linear, or not fitted yet.
    """
    try:
        coef, intercept = estimator.coef_, estimator.intercept_
    except AttributeError:
        name = type(estimator).__name__
        raise EncodingError(name, "has no coef_ and intercept_; fit it first, or it isn't linear") from None
    return {
        "coef": np.asarray(coef, dtype=np.float32),
        "intercept": np.atleast_1d(np.asarray(intercept, dtype=np.float32)),
    }


def load_state(estimator: Any, state: Mapping[str, Any], classes: Sequence[Any] | None = None) -> None:
    """Put a state into the estimator, fitted or not; `classes` are a classifier's labels in sorted order.

    The labels must be the same at every member, also where a member has none of a class.

    Raises `EncodingError` for a classifier without labels, or for labels that don't fit the state.
    """
    coef = np.array(state["coef"], dtype=np.float64)
    intercept = np.array(state["intercept"], dtype=np.float64)
    if getattr(estimator, "_estimator_type", None) == "classifier" or hasattr(estimator, "decision_function"):
        labels = np.asarray(getattr(estimator, "classes_", ()) if classes is None else classes)
        rows = 1 if len(labels) == 2 else len(labels)
        if coef.shape[0] != rows:
            raise EncodingError(
                "classes", f"{len(labels)} labels don't fit {coef.shape[0]} rows; give classes="
            )
        estimator.classes_ = labels
    estimator.coef_ = coef
    estimator.intercept_ = intercept
    estimator.n_features_in_ = coef.shape[-1]
