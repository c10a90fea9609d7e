"""A published model is opened only by those it is for, and only as its publisher signed it."""

import hashlib
import itertools
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client.devices import (
    DeviceModel,
    ModelManifest,
    ModelRefused,
    ModelTrust,
    Provenance,
    manifest_for,
    open_model,
    publish,
)
from blindsum.client.devices.model_exchange import fetch_model, list_models, send_model, trust_in
from blindsum.client.federation_view import FederationView
from blindsum.client.testing import Federation
from blindsum.crypto.errors import BlindsumError, DocumentError, PolicyViolation, RefusalReason, Refused
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.policy import Policy
from without_torch import NO_TORCH

FEDERATION = hashlib.sha256(b"a federation").digest()
PUBLISHER, STRANGER = SigningKey(b"p" * 32), SigningKey(b"s" * 32)
GROUP = GroupKey(b"g" * 32, 4)
ARTEFACT = b"weights of a model " * 100


def manifest(artefact: bytes = ARTEFACT, **changes: Any) -> ModelManifest:
    values: dict[str, Any] = {
        "federation": FEDERATION, "publisher": "hospital", "name": "chest", "version": 3, "created": 1,
        "kind": "safetensors", "provenance": Provenance(training="here", network="a:b"),
    }  # fmt: skip
    return manifest_for(artefact, **{**values, **changes})


def trust(**changes: Any) -> ModelTrust:
    return ModelTrust(
        **{
            "federation": FEDERATION,
            "publishers": {"hospital": PUBLISHER.public},
            "group_key": GROUP,
            **changes,
        }
    )


def sealed(signer: SigningKey = PUBLISHER, group: GroupKey = GROUP, **changes: Any) -> bytes:
    return publish(manifest(**changes), ARTEFACT, signer, group_key=group)


def test_members_open_what_was_sealed_to_them() -> None:
    data = sealed()
    opened = open_model(data, trust())
    assert (opened.artefact, opened.manifest) == (ARTEFACT, manifest())
    assert ARTEFACT[:19] not in data
    assert b"safetensors" not in data, "not even the manifest can be read"


@pytest.mark.parametrize(
    ("data", "given", "wanted", "error"),
    [
        (sealed(), trust(group_key=None), {}, ModelRefused),
        (sealed(), trust(group_key=GroupKey(b"h" * 32, 4)), {}, BlindsumError),
        (sealed(), trust(group_key=GroupKey(b"g" * 32, 5)), {}, ModelRefused),
        (sealed(signer=STRANGER), trust(), {}, DocumentError),
        (sealed(publisher="other"), trust(), {}, ModelRefused),
        (sealed(federation=bytes(32)), trust(), {}, ModelRefused),
        (sealed(), trust(), {"at_least": 4}, ModelRefused),
        (sealed(), trust(), {"name": "hand"}, ModelRefused),
        (b"something else", trust(), {}, Refused),
        (sealed()[:40], trust(), {}, BlindsumError),
    ],
    ids=[
        "no group key", "another group key", "another epoch", "another signer", "an untrusted publisher",
        "another federation", "an older version", "another name", "no model", "cut off",
    ],
)  # fmt: skip
def test_what_is_refused(
    data: bytes, given: ModelTrust, wanted: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_model(data, given, **wanted)


def test_no_changed_byte_is_accepted() -> None:
    policy = _policy(open_models=True)
    for data, given in (
        (sealed(), trust()),
        (publish(manifest(), ARTEFACT, PUBLISHER, policy=policy), trust(open_models=True)),
    ):
        assert open_model(data, given).artefact == ARTEFACT
        for place in itertools.chain(range(0, len(data), 97), (len(data) - 1,)):
            changed = bytearray(data)
            changed[place] ^= 1
            with pytest.raises(BlindsumError):
                open_model(bytes(changed), given)


def test_open_models_only_by_policy() -> None:
    with pytest.raises(PolicyViolation):
        publish(manifest(), ARTEFACT, PUBLISHER)
    with pytest.raises(PolicyViolation):
        publish(manifest(), ARTEFACT, PUBLISHER, policy=_policy(open_models=False))
    data = publish(manifest(), ARTEFACT, PUBLISHER, policy=_policy(open_models=True))
    assert open_model(data, trust(open_models=True, group_key=None)).artefact == ARTEFACT
    with pytest.raises(PolicyViolation):
        open_model(data, trust(open_models=False))


def _policy(**changes: Any) -> Any:
    return Policy(
        federation=FEDERATION, version=1, valid_until=1, schemes=("masking",), n_min=3, n_max=3, **changes
    )


def test_a_manifest_of_other_bytes_is_not_signed() -> None:
    with pytest.raises(ModelRefused):
        publish(manifest(b"other"), ARTEFACT, PUBLISHER, group_key=GROUP)


def test_a_model_without_an_artefact_for_devices_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "weights.model").write_bytes(sealed())
    with pytest.raises(ModelRefused, match="blindsum optimize"):
        DeviceModel.load(tmp_path / "weights.model", trust())


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with Federation(["hospital", "clinic", "other"]) as made:
        yield made


def test_models_travel_by_the_aggregator_which_cannot_read_them(federation: Federation) -> None:
    artefact = np.random.default_rng(0).bytes(700_000)
    with (
        FederationView.open(federation.path("hospital")) as hospital,
        FederationView.open(federation.path("clinic")) as clinic,
    ):
        common = {"federation": hospital.roster.federation, "publisher": "hospital"}

        def version(number: int) -> bytes:
            described = manifest(artefact, **common, version=number)
            return publish(described, artefact, hospital.identity, group_key=hospital.group_key)

        first = version(1)
        send_model(hospital, first)
        send_model(hospital, first)
        assert fetch_model(clinic, "hospital", "chest") == first
        on_disk = b"".join(
            path.read_bytes() for path in (federation.folder / "server").rglob("*") if path.is_file()
        )
        assert first[-4096:] in on_disk, "the scan sees what the server stores"
        assert artefact[1000:1032] not in on_disk
        for number in (2, 3, 4, 5):
            send_model(hospital, version(number))
        assert [one.version for one in list_models(clinic)] == [3, 4, 5], "old versions go"
        opened = open_model(fetch_model(clinic, "hospital", "chest"), trust_in(clinic, "hospital"))
        assert (opened.manifest.version, opened.artefact) == (5, artefact)
        with pytest.raises(Refused) as caught:
            send_model(hospital, version(4))
        assert caught.value.reason is RefusalReason.CONFLICT
        with pytest.raises(ModelRefused):
            fetch_model(clinic, "hospital", "chest", at_least=6)
        with pytest.raises(ModelRefused):
            fetch_model(clinic, "other", "chest")
        with pytest.raises(ModelRefused, match="trusted publisher"):
            send_model(clinic, version(6))
        blobs = federation.folder / "server/blobs/model"
        assert len(list(blobs.iterdir())) == 3
        federation.stop_server()
        federation.start_server()
        assert fetch_model(clinic, "hospital", "chest") == fetch_model(clinic, "hospital", "chest")


def test_an_older_version_than_one_fetched_before_is_refused(federation: Federation) -> None:
    """The aggregator hides the newest version: what it still has is signed, but a step back."""
    with FederationView.open(federation.path("hospital")) as hospital:
        for number in (1, 2):
            described = manifest(
                federation=hospital.roster.federation, publisher="hospital", name="hand", version=number
            )
            send_model(
                hospital, publish(described, ARTEFACT, hospital.identity, group_key=hospital.group_key)
            )
    with FederationView.open(federation.path("clinic")) as clinic:
        newest = fetch_model(clinic, "hospital", "hand")
        assert open_model(newest, trust_in(clinic, "hospital")).manifest.version == 2
    federation.stop_server()
    with sqlite3.connect(federation.folder / "server/state.sqlite") as state:
        assert state.execute("DELETE FROM model WHERE name = 'hand' AND number = 2").rowcount == 1
    state.close()
    federation.start_server()
    with FederationView.open(federation.path("clinic")) as clinic:
        assert [one.version for one in list_models(clinic) if one.name == "hand"] == [1]
        with pytest.raises(ModelRefused, match="older than version 2, seen before"):
            fetch_model(clinic, "hospital", "hand")
    with FederationView.open(federation.path("other")) as other:
        opened = open_model(fetch_model(other, "hospital", "hand"), trust_in(other, "hospital"))
        assert opened.manifest.version == 1, "who saw nothing newer can't know"


def test_who_holds_an_expired_roster_does_nothing_under_it(federation: Federation) -> None:
    """The aggregator withholds what the owner signed since: whoever was removed would still be trusted."""
    long_after = time.time() + 31 * 86_400
    with pytest.raises(PolicyViolation, match="has expired"):
        FederationView.open(federation.path("clinic"), now=lambda: long_after)
    FederationView.open(federation.path("clinic"), fetch=False, now=lambda: long_after).close()


def test_publishing_and_opening_need_no_torch() -> None:
    code = (
        NO_TORCH + "import blindsum.client.devices, blindsum.client.hard_examples\nprint(sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'onnxruntime'" not in run.stdout
    assert "'blindsum.client.devices.device_model'" in run.stdout
