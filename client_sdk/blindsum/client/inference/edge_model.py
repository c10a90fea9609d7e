"""Collaborative inference: the edge answers what it is sure of, the cloud what is doubtful."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from blindsum.client.inference.calibration import Floats, Labels, confidence, fit_temperature
from blindsum.client.inference.cloud_tail import CloudAnswer, CloudTail, CloudUnavailable, ImplausibleAnswer
from blindsum.client.inference.gate import Gate, Judgement
from blindsum.client.inference.shadow import Shadow, ShadowReport
from blindsum.crypto.errors import ParameterRefused

Body = Callable[[Any], tuple[Floats, Floats]]
"""Images (n, ...) in, logits (n,) and features (n, d) out: an `OnnxBody`, or any function."""


@dataclass(frozen=True)
class Answer:
    """An answer about one image. It is advice: nobody proves that the cloud computed it faithfully.

    `confidence` is calibrated on local data. `mode` is how the image was handled: `local` if nothing left the
    device. `version` is that of the model that answered. A doubtful answer that the cloud didn't give is not
    `confirmed`; a `novel` image looks unlike all that the edge was trained on.
    """

    label: str
    confidence: float
    answered_by: Literal["edge", "cloud"]
    mode: Literal["local", "tls", "encrypted"]
    version: str
    confirmed: bool
    novel: bool
    edge_label: str

    def __str__(self) -> str:
        sure = "" if self.confirmed else ", not confirmed"
        new = ", unlike any training image" if self.novel else ""
        by = f"{self.answered_by} {self.version}, {self.mode}"
        return f"{self.label} ({self.confidence:.0%}, by {by}{sure}{new})"


class EdgeModel:
    """An edge model with a gate and, for doubtful images, a cloud. Without `cloud` it never sends (mode
    `local`).

    `labels` are the names of the two classes, the second for logits above 0. Questions to the cloud stop by
    themselves where `shadow` finds that it doesn't help.
    """

    def __init__(
        self,
        body: Body,
        gate: Gate,
        *,
        labels: Sequence[str],
        version: str,
        cloud: CloudTail | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        if len(labels) != 2:
            raise ParameterRefused(f"an edge model tells two classes apart, not {len(labels)}")
        self.cloud = cloud
        self.shadow = shadow or Shadow()
        self.version = version
        self._body = body
        self._gate = gate
        self._labels = tuple(labels)
        self._cloud_temperature = 1.0
        self._largest_logit = float("inf")

    def answer(self, image: Any) -> Answer:
        """The answer about one image, without its batch dimension."""
        logits, features = self._body(np.asarray(image)[None])
        judgement = self._gate.judge(float(logits[0]), features[0])
        edge = self._edge_answer(float(logits[0]), judgement)
        if edge.confirmed or self.cloud is None or not self.shadow.helps:
            return edge
        given = self._ask(features[0])
        if given is None:
            return edge
        return replace(
            edge,
            label=self._label(given.logit),
            confidence=float(confidence(np.array([given.logit]), self._cloud_temperature)[0]),
            answered_by="cloud",
            mode=self.cloud.mode,
            version=given.version,
            confirmed=True,
        )

    def learn_truth(self, answer: Answer, truth: str) -> None:
        """Tell the true label of an image that the cloud answered: it keeps the shadow evaluation current."""
        if truth not in self._labels:
            raise ParameterRefused(f"{truth!r} is none of the labels {', '.join(self._labels)}")
        if answer.answered_by == "cloud":
            self.shadow.record(answer.edge_label == truth, answer.label == truth)

    def shadow_evaluate(self, images: Any, labels: Labels) -> ShadowReport:
        """Measure on labelled local images (labels 0 and 1) whether the cloud helps here, and act on it.

        Asks the cloud about every doubtful one. Calibrates the cloud's answers too. Raises `CloudUnavailable`
        if it couldn't answer them: then nothing has changed.
        """
        if self.cloud is None:
            raise ParameterRefused("this model has no cloud to evaluate")
        if not len(images) or len(images) != len(labels):
            raise ParameterRefused("shadow evaluation needs images and as many labels")
        logits, features = self._body(np.asarray(images))
        truth = np.asarray(labels) > 0
        doubtful = np.array(
            [
                self._gate.judge(float(one), feature).doubtful
                for one, feature in zip(logits, features, strict=True)
            ]
        )
        rows = np.flatnonzero(doubtful)
        answers = np.array([self.cloud.ask(features[row]).logit for row in rows])
        final = logits.copy()
        final[rows] = answers
        right = np.stack([(logits > 0) == truth, (final > 0) == truth])
        self.shadow.forget()
        self.shadow.measured = True
        for row in rows:
            self.shadow.record(bool(right[0, row]), bool(right[1, row]))
        if len(rows):
            self._cloud_temperature = fit_temperature(answers, truth[rows])
            self._largest_logit = 4 * float(np.abs(answers).max()) + 10
        edge, cascade = right.mean(axis=1)
        return ShadowReport(
            len(images), len(rows) / len(images), float(edge), float(cascade), self.shadow.helps
        )

    def _ask(self, feature: Floats) -> CloudAnswer | None:
        """The cloud's answer, or None. Nothing that depends on an opened answer ever goes back."""
        assert self.cloud is not None
        try:
            given = self.cloud.ask(feature)
        except (CloudUnavailable, ImplausibleAnswer):
            return None
        return given if abs(given.logit) <= self._largest_logit else None

    def _edge_answer(self, logit: float, judgement: Judgement) -> Answer:
        label = self._label(logit)
        return Answer(
            label=label,
            confidence=judgement.confidence,
            answered_by="edge",
            mode="local",
            version=self.version,
            confirmed=not judgement.doubtful,
            novel=judgement.novel,
            edge_label=label,
        )

    def _label(self, logit: float) -> str:
        return self._labels[int(logit > 0)]
