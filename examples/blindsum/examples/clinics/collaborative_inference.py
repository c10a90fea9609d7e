"""The fourth way: infer together. A tiny edge model, an encrypted tail in the cloud, and what each is worth.

    result = run_collaborative_inference(seed=0, folder=Path("run/inference"))
    result.json_parts()          # {"tail": ..., "inversion": ..., "cascade": ...}

The service is the real one, in its own process, on loopback, over mutual TLS. The cloud's parts are
trained on the hospital's images; clinic 1 brings its own labelled images to calibrate the gate and to find
out whether the cloud helps; test images are read once, for the accuracies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from blindsum.client.inference import CloudTail, EdgeModel, Gate, ShadowReport
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.examples.clinics.feature_inversion import Inversion, invert, server_view
from blindsum.examples.clinics.inference_process import InferenceProcess, inference_process
from blindsum.examples.clinics.model import standardise
from blindsum.examples.clinics.sites import HOSPITAL, Images, Pixels, SiteData, load_site, load_test
from blindsum.examples.clinics.split_network import EdgeBody, Floats, SplitNetwork, SplitPlan, train_split
from blindsum.examples.clinics.tail_costs import TailCosts, measure_tail
from numpy.typing import NDArray

LABELS: Final = ("normal", "pneumonia")
TARGET_RISK: Final = 0.02
MOST_SENT: Final = 0.42
NO_GAIN: Final = 0.02
"""A gain below two points is none: one accuracy on the test images is uncertain by about 1.5 points."""
AGREEMENT_IMAGES: Final = 200
ATTACKER_IMAGES: Final = 400
VICTIM_IMAGES: Final = 100
SHARES: Final = tuple(number / 10 for number in range(11))

Report = Callable[[str], None]


@dataclass(frozen=True)
class Deployment:
    """One edge model at one site, with the cloud beside it. Accuracies are balanced, fractions of 1, on
    test images.

    `cascade` is what the site gets, `forced` what it would get if doubtful images were always sent.
    `helps` is what the site's shadow evaluation found on its own images, before any test image was read.
    `curve` has (share sent, balanced accuracy) when the least sure part of the test images is sent.
    """

    site: str
    edge_model: str
    edge: float
    cascade: float
    forced: float
    share_sent: float
    shadow: ShadowReport
    curve: tuple[tuple[float, float], ...]

    @property
    def helps(self) -> bool:
        """Whether questions stayed on."""
        return self.shadow.helps


@dataclass(frozen=True)
class CollaborativeInference:
    """All that was measured; `deployments` starts with the tiny edge model at clinic 1, the figure of the
    demo.
    """

    seed: int
    tail: TailCosts
    inversion: Inversion
    deployments: tuple[Deployment, ...]

    @property
    def switched_off_where_no_gain(self) -> bool:
        """Whether each deployment that gains nothing by the cloud stopped asking by itself; there is at
        least one.
        """
        idle = [one for one in self.deployments if one.forced - one.edge < NO_GAIN]
        return bool(idle) and not any(one.helps for one in idle)

    def json_parts(self) -> dict[str, Any]:
        """The parts `tail`, `inversion` and `cascade` of the demo's JSON."""
        first = self.deployments[0]
        return {
            "tail": asdict(self.tail),
            "inversion": {"clear": self.inversion.clear, "encrypted": self.inversion.encrypted},
            "cascade": {
                "edge": first.edge,
                "cascade": first.cascade,
                "share_sent": first.share_sent,
                "switched_off_where_no_gain": self.switched_off_where_no_gain,
            },
        }


def run_collaborative_inference(
    seed: int,
    folder: Path,
    *,
    plan: SplitPlan | None = None,
    attacker_images: int = ATTACKER_IMAGES,
    victim_images: int = VICTIM_IMAGES,
    test: Callable[[str, int], Images] = load_test,
    report: Report = lambda _: None,
) -> CollaborativeInference:
    """Train, serve, ask, attack: about two minutes on one core.

    `folder` gets the service's data, its log and the record of its messages. `test` reads the images for
    the final figures (validation images while hyperparameters were chosen). `report` is told each step.
    """
    plan = plan or SplitPlan()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number of threads may round differently
    try:
        report("training stem, tail and exit on the hospital's images")
        hospital, clinic = load_site(HOSPITAL, seed), load_site("clinic-1", seed)
        network = train_split(hospital, seed, plan)
        report("starting the inference service")
        with inference_process(folder, network.tail) as service, service.member("clinic-1") as cloud:
            cloud.prepare()
            deployments = _deploy_all(network, clinic, cloud, seed, plan, test, report)
            report(f"asking about {AGREEMENT_IMAGES} images, encrypted, and TenSEAL's mm about two")
            asked = network.features(test("clinic-1", seed).pixels[:AGREEMENT_IMAGES])
            costs = measure_tail(service, cloud, network.tail, asked)
            report("attacking the server's view")
            inversion = _attack(network, service, cloud, hospital, clinic, attacker_images, victim_images)
    finally:
        torch.set_num_threads(threads)
    return CollaborativeInference(seed, costs, inversion, deployments)


def _deploy_all(
    network: SplitNetwork,
    clinic: SiteData,
    cloud: CloudTail,
    seed: int,
    plan: SplitPlan,
    test: Callable[[str, int], Images],
    report: Report,
) -> tuple[Deployment, ...]:
    inverted = load_site("clinic-4", seed)
    found = []
    for name, site, body in (
        ("tiny exit", clinic, network.tiny_edge),
        ("stem and linear head", clinic, network.good_edge),
        ("stem and a head of its own", inverted, network.own_head(inverted, seed, plan)),
    ):
        report(f"shadow evaluation at {site.spec.name}: {name}")
        found.append(_deploy(name, site, body, network.tail, cloud, test(site.spec.name, seed)))
    return tuple(found)


def _deploy(
    name: str, site: SiteData, body: EdgeBody, tail: TailModel, cloud: CloudTail, test: Images
) -> Deployment:
    """Calibrate on half of the site's own images, find out on the other half whether the cloud helps, then
    test.

    Half of the training images and all validation images fit the gate, the other half is its reference for
    novelty and measures the cloud.
    """
    half = len(site.train) // 2
    fitting = np.concatenate([site.train.pixels[:half], site.validation.pixels])
    labels = np.concatenate([site.train.labels[:half], site.validation.labels])
    logits, features = body(fitting)
    reference = body(site.train.pixels[half:])[1]
    gate = Gate.fit(
        logits, features, labels, reference=reference, target_risk=TARGET_RISK, most_sent=MOST_SENT
    )
    model = EdgeModel(body, gate, labels=LABELS, version="edge-1", cloud=cloud)
    shadow = model.shadow_evaluate(site.train.pixels[half:], site.train.labels[half:])
    answers = [model.answer(image) for image in test.pixels]
    given = np.array([answer.label == LABELS[1] for answer in answers])
    sent = np.array([answer.answered_by == "cloud" for answer in answers])
    edge_logits, edge_features = body(test.pixels)
    cloud_logits = tail.logits(edge_features)
    doubtful = np.array(
        [
            gate.judge(float(one), feature).doubtful
            for one, feature in zip(edge_logits, edge_features, strict=True)
        ]
    )
    forced = np.where(doubtful, cloud_logits, edge_logits)
    order = np.argsort(np.abs(edge_logits))
    curve = []
    for share in SHARES:
        mixed = edge_logits.copy()
        rows = order[: round(share * len(order))]
        mixed[rows] = cloud_logits[rows]
        curve.append((share, _balanced(mixed > 0, test.labels)))
    return Deployment(
        site=site.spec.name,
        edge_model=name,
        edge=_balanced(edge_logits > 0, test.labels),
        cascade=_balanced(given, test.labels),
        forced=_balanced(forced > 0, test.labels),
        share_sent=float(sent.mean()),
        shadow=shadow,
        curve=tuple(curve),
    )


def _balanced(given: NDArray[np.bool_], labels: NDArray[np.uint8]) -> float:
    """Mean of the two recalls."""
    return float((given[labels == 1].mean() + (~given[labels == 0]).mean()) / 2)


def _attack(
    network: SplitNetwork,
    service: InferenceProcess,
    cloud: CloudTail,
    hospital: SiteData,
    clinic: SiteData,
    attacker_images: int,
    victim_images: int,
) -> Inversion:
    """The attacker has the hospital's images and their whole traffic; the victim is clinic 1."""
    known = hospital.train.pixels[:attacker_images]
    victim = clinic.train.pixels[:victim_images]
    known_features, victim_features = network.features(known), network.features(victim)
    with service.member(HOSPITAL) as member:
        member.prepare()
        for feature in known_features:
            member.ask(feature)
    for feature in victim_features:
        cloud.ask(feature)
    circuit = network.tail.circuit
    return invert(
        _flat(known),
        known_features,
        server_view(service.capture, circuit, HOSPITAL, len(known)),
        _flat(victim),
        victim_features,
        server_view(service.capture, circuit, "clinic-1", len(victim)),
    )


def _flat(images: Pixels) -> Floats:
    """Images as the stem sees them, (n, 784)."""
    return standardise(torch.from_numpy(images)).double().numpy().reshape(len(images), -1)
