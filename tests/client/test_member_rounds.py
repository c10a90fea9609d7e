"""Members, owner and the real server, over TLS on loopback."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blindsum.client import FolderInUse, Member, Round, join
from blindsum.client.testing import Federation, small_model
from blindsum.crypto.errors import EncodingError, Refused, RoundAborted

Make = Callable[..., Federation]


def power_of_two(name: str) -> float:
    """Each member's own power of two, so that a sum shows who is in it, and how often."""
    return 2.0 ** -(6 + int(name.rpartition("-")[2]))


def push(name: str, index: int) -> dict[str, Any]:
    return {"weight": np.float32(power_of_two(name)), "bias": np.float32(-power_of_two(name))}


def test_three_members_agree_bit_for_bit_on_the_exact_sum(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=2, metrics={"loss": (0.0, 8.0, 0.5)})

    def app(member: Member) -> tuple[list[Any], Any]:
        receipts = []
        for rnd in member.rounds():
            weights = rnd.weights()
            added = push(member.name, rnd.index)
            after = {name: value + added[name] for name, value in weights.items()}
            receipts.append(rnd.submit(after, examples=10, metrics={"loss": float(rnd.index)}))
        return receipts, member.latest_state()

    for name in federation.names:
        federation.open(name).close()
    members = {name: Member.open(federation.path(name), witness=True) for name in federation.names}
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        with members[name] as member:
            results[name] = app(member)

    threads = [threading.Thread(target=run, args=(name,)) for name in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(results) == set(federation.names)

    for position in range(2):
        receipts = [results[name][0][position] for name in federation.names]
        assert len({receipt.receipt for receipt in receipts}) == 1
        assert receipts[0].survivors == 3
        assert receipts[0].metrics == {"loss": position + 1.0}
        # The plain sum of what each member encoded, added up here, is what was opened: bit for bit.
        witnesses = [
            np.load(federation.path(name) / "witness" / f"round-{receipts[0].round:06d}.npz")
            for name in federation.names
        ]
        plain = sum(witness["fields"].astype(np.uint64) for witness in witnesses)
        assert all(np.array_equal(witness["summed"], plain) for witness in witnesses)
        assert all(len(witness["survivors"]) == 3 for witness in witnesses)
        uploads = {receipt.signed for receipt in receipts}
        assert len(uploads) == 3, "each member signs its own receipt"

    models = [results[name][1] for name in federation.names]
    mean = sum(power_of_two(name) for name in federation.names) / 3
    for model in models:
        assert np.array_equal(model["weight"], models[0]["weight"])
        np.testing.assert_allclose(model["weight"], small_model()["weight"] + 2 * mean, atol=1e-4)
        np.testing.assert_allclose(model["bias"], -2 * mean, atol=1e-4)
    owners = federation.owner.model()
    assert np.array_equal(owners["weight"], models[0]["weight"])


def test_receipts_chain_from_round_to_round(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), rounds=2)
    results = federation.train(push)
    first, second = results["member-1"]
    assert second.receipt.previous == first.receipt.transcript()
    with federation.open("member-1") as member:
        assert [receipt.receipt for receipt in member.receipts()] == [first.receipt, second.receipt]
        assert list(member.rounds()) == [], "the plan is finished"


def test_weights_by_size_shift_the_mean(blindsum_federation: Make) -> None:
    federation = blindsum_federation(
        3, model=small_model("zeros"), plan={"weighting": "size", "max_examples": 8, "weight_ratio": 8}
    )
    examples = {"member-1": 1, "member-2": 2, "member-3": 5}

    def app(member: Member) -> None:
        for rnd in member.rounds():
            after = {
                name: value + np.float32(power_of_two(member.name)) for name, value in rnd.weights().items()
            }
            rnd.submit(after, examples=examples[member.name])

    federation.run(app)
    expected = sum(examples[name] * power_of_two(name) for name in examples) / 8
    np.testing.assert_allclose(federation.owner.model()["bias"], expected, atol=5e-5)


def test_only_the_shared_part_is_summed_and_the_head_stays_here(blindsum_federation: Make) -> None:
    first = {"body.w": np.zeros(20, np.float32), "head.w": np.zeros(4, np.float32), "steps": np.array(0)}
    federation = blindsum_federation(3, model=first, rounds=2, shared=["body.*"])

    def app(member: Member) -> dict[str, Any]:
        mine = dict(first)
        for rnd in member.rounds():
            mine = rnd.weights(like=mine)
            assert set(mine) == set(first)
            if rnd.index == 2:
                assert set(rnd.weights()) == set(first), "the head is known from the last submit"
            mine["body.w"] = mine["body.w"] + np.float32(power_of_two(member.name))
            mine["head.w"] = mine["head.w"] + np.float32(power_of_two(member.name))
            mine["steps"] = mine["steps"] + 1
            rnd.submit(mine, examples=1)
        return mine

    results = federation.run(app)
    for name, state in results.items():
        np.testing.assert_array_equal(state["head.w"], np.float32(2 * power_of_two(name)))
        assert state["steps"] == 2
    assert set(federation.owner.model()) == {"body.w"}


@pytest.mark.torch
def test_a_torch_model_trains_as_in_the_readme(blindsum_federation: Make) -> None:
    torch = pytest.importorskip("torch", reason="torch isn't installed: pip install 'blindsum[torch]'")
    torch.manual_seed(0)

    def network() -> Any:
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    federation = blindsum_federation(3, model=network().state_dict(), metrics={"loss": (0.0, 1.0)})

    def app(member: Member) -> Any:
        model = network()
        for rnd in member.rounds():
            with rnd:
                model.load_state_dict(rnd.weights(like=model.state_dict()))
                model(torch.randn(8, 4)).sum().backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.01 * parameter.grad
                rnd.submit(model.state_dict(), examples=8, metrics={"loss": 0.25})
        return model.state_dict(), member.latest_state()

    results = federation.run(app)
    local, shared = results["member-1"]
    assert local["1.num_batches_tracked"] == 1
    assert "1.num_batches_tracked" not in shared
    assert shared["0.weight"].dtype == torch.float32
    assert torch.equal(shared["0.weight"], results["member-2"][1]["0.weight"])


def test_what_cannot_be_encoded_is_refused_and_the_round_goes_on(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model(), metrics={"loss": (0.0, 1.0)})
    bad: list[tuple[str, dict[str, Any]]] = [
        ("weight", {"state": {"weight": np.full((10, 10), np.nan, np.float32)}}),
        ("bias", {"state": {"bias": np.zeros(3, np.float32)}}),
        ("bias", {"state": {"bias": np.zeros(10, object)}}),
        ("loss", {"metrics": {"loss": 2.0}}),
        ("loss", {"metrics": {}}),
        ("speed", {"metrics": {"loss": 0.5, "speed": 1.0}}),
        ("weight", {"examples": 0}),
        ("weight", {"examples": 1 << 20}),
    ]

    def app(member: Member) -> int:
        refused = 0
        for rnd in member.rounds():
            good = {"state": rnd.weights(), "metrics": {"loss": 0.5}, "examples": 1}
            if member.name == "member-1":
                for name, change in bad:
                    values = {**good, **change, "state": {**good["state"], **change.get("state", {})}}
                    with pytest.raises(EncodingError) as error:
                        rnd.submit(values["state"], examples=values["examples"], metrics=values["metrics"])
                    assert error.value.name == name
                    refused += 1
                assert not list(member.path.glob("spool-*")), "nothing was protected, nothing was sent"
            rnd.submit(good["state"], examples=1, metrics={"loss": 0.5})
        return refused

    assert federation.run(app)["member-1"] == len(bad)


def test_a_round_takes_one_update(blindsum_federation: Make) -> None:
    federation = blindsum_federation(3, model=small_model())

    def app(member: Member) -> None:
        for rnd in member.rounds():
            rnd.submit(rnd.weights(), examples=1)
            with pytest.raises(RoundAborted, match="already"):
                rnd.submit(rnd.weights(), examples=1)

    federation.run(app)


def test_a_folder_belongs_to_one_process(blindsum_federation: Make) -> None:
    federation = blindsum_federation(1)
    with federation.open("member-1"), pytest.raises(FolderInUse):
        Member.open(federation.path("member-1"))


def test_a_member_that_was_not_admitted_is_told_so(blindsum_federation: Make, tmp_path: Path) -> None:
    federation = blindsum_federation(0)
    join(federation.owner.invite("late"), tmp_path / "late", wait=False)
    with Member.open(tmp_path / "late") as member, pytest.raises(Refused, match="hasn't admitted"):
        next(member.rounds())


def test_equal_seeds_give_equal_sums_and_different_uploads(blindsum_federation: Make) -> None:
    digests, uploads = [], []
    for _ in range(2):
        federation = blindsum_federation(3, model=small_model())
        sent: dict[str, bytes] = {}

        def app(member: Member, sent: dict[str, bytes] = sent) -> bytes:
            for rnd in member.rounds():
                after = {name: value + np.float32(0.001) for name, value in rnd.weights().items()}
                receipt = rnd.submit(after, examples=1)
            return receipt.sum_digest

        def keep(name: str, federation: Federation = federation, sent: dict[str, bytes] = sent) -> Any:
            def report(phase: str, done: int, total: int) -> None:
                if phase == "upload":
                    sent.setdefault(name, next(federation.path(name).glob("spool-*.bin")).read_bytes())

            return report

        results = {}
        members = [
            federation.open(name, rounding_seed=bytes(32), witness=True, on_progress=keep(name))
            for name in federation.names
        ]

        def run(member: Member, results: dict[str, Any] = results, app: Any = app) -> None:
            results[member.name] = app(member)

        threads = [threading.Thread(target=run, args=(member,)) for member in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for member in members:
            member.close()
        summed = np.load(federation.path("member-1") / "witness" / "round-000001.npz")["summed"]
        digests.append(summed[:-8].tobytes())
        uploads.append(sent)
        assert len(set(results.values())) == 1
    # The tags of the sum check are keyed by the round, so the last fields differ.
    assert digests[0] == digests[1]
    assert all(uploads[0][name] != uploads[1][name] for name in uploads[0])


def test_leaving_the_loop_early_is_no_loss_for_the_others(blindsum_federation: Make) -> None:
    federation = blindsum_federation(5, model=small_model(), rounds=1, plan={"cohort_min": 4})
    out = threading.Event()

    def app(member: Member) -> int:
        for rnd in member.rounds():
            assert isinstance(rnd, Round)
            if member.name == "member-5":
                out.set()
                break
            out.wait(20)
            return rnd.submit(rnd.weights(), examples=1).survivors
        return 0

    results = federation.run(app)
    assert results["member-5"] == 0
    assert set(results.values()) == {0, 4}
