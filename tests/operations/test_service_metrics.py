"""Metrics count what happened; dashboard and alarms ask only for what there is; none tells a secret."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import promql_parser
import pytest
import yaml
from blindsum.aggregator.embedding import ServerHandle
from blindsum.proto.v1 import round_pb2
from prometheus_client.parser import text_string_to_metric_families
from scripted_federation import Scene

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations"
Run = Callable[..., ServerHandle]
Build = Callable[..., Scene]


def exposition(handle: ServerHandle) -> str:
    token = (handle.server.settings.data_dir / "admin.token").read_text().strip()
    answer = httpx.get(
        f"http://127.0.0.1:{handle.server.admin_port}/metrics", headers={"Authorization": f"Bearer {token}"}
    )
    assert answer.status_code == 200
    return answer.text


class Samples:
    """What was exposed: the value of a metric with these labels, and the labels that each metric has."""

    def __init__(self, text: str) -> None:
        self.values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.labels: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.values[sample.name, frozenset(sample.labels.items())] = sample.value
                self.labels.setdefault(sample.name, set()).update(sample.labels)

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]


@pytest.fixture
def eventful(run_server: Run, build: Build) -> tuple[ServerHandle, Scene]:
    """One round concluded, one aborted, one open; refusals, a refused sum, uploads that wait."""
    handle = run_server(upload_slots=1)
    scene = build(handle, rounds=3)
    scene.run_steps(1)
    scene.conclude(1)
    scene.run_steps(2)
    for member in scene.members:
        member.refuse_sum(2, "the check failed")
    for member in scene.members:
        member.until_asked("advertise", 3)
        member.answer(3, "advertise")
    first = scene.members[0]
    first.until_asked("upload", 3)
    first.upload(3)
    second, third = scene.members[1:]
    second.until_asked("upload", 3)
    assert second.begin(3, second.contribution()).HasField("slot")
    assert third.begin(3, third.contribution()).retry_after_ms
    with pytest.raises(grpc.RpcError):
        first.upload(3, bytes(8 * 20_000))
    return handle, scene


def test_what_happened_is_counted(eventful: tuple[ServerHandle, Scene]) -> None:
    handle, scene = eventful
    found = Samples(exposition(handle))
    federation = scene.owner.federation.hex()[:16]
    states = {
        state: found("blindsum_rounds", federation=federation, state=state)
        for state in ("open", "published", "concluded", "aborted")
    }
    assert states == {"open": 1, "published": 0, "concluded": 1, "aborted": 1}
    assert found("blindsum_rounds_ended_total", federation=federation, outcome="concluded") == 1
    assert found("blindsum_rounds_ended_total", federation=federation, outcome="aborted") == 1
    assert found("blindsum_sums_refused_total", federation=federation) == 3
    assert found("blindsum_uploads_accepted_total", federation=federation, kind="contribution") == 7
    assert found("blindsum_uploads_accepted_total", federation=federation, kind="checkpoint") == 1
    assert found("blindsum_refusals_total", method="BeginUpload", reason="conflict") == 1
    assert found("blindsum_fold_waiting", federation=federation) == 1
    assert found("blindsum_fold_lag_seconds", federation=federation) > 0
    assert found("blindsum_round_participants", federation=federation, phase="upload") == 3
    assert found("blindsum_round_replied", federation=federation, phase="upload") == 1
    assert found("blindsum_round_deadline_timestamp_seconds", federation=federation) > 0
    assert found("blindsum_members_connected", federation=federation) == 3
    assert found("blindsum_members_enrolled", federation=federation) == 3
    for phase, times in {"advertise": 3, "upload": 2, "confirm": 2, "publish": 2, "conclude": 1}.items():
        assert found("blindsum_phase_seconds_count", phase=phase) == times
    bulk = 7 * len(scene.members[0].contribution())
    assert bulk < found("blindsum_received_bytes_total", method="Upload") < 1.05 * bulk
    assert found("blindsum_call_seconds_count", method="Upload", outcome="ok") == 8
    assert found("blindsum_call_seconds_count", method="BeginUpload", outcome="refused") == 1
    assert found("blindsum_uploads_deferred_total") == 1
    assert found("blindsum_ready") == 1
    assert found("blindsum_blob_bytes", room="contribution") == len(scene.members[0].contribution())
    assert found("blindsum_audit_events") > 0
    assert found("blindsum_audit_broken") == 0


def test_a_restart_goes_on_counting_from_the_state(
    eventful: tuple[ServerHandle, Scene], run_server: Run
) -> None:
    handle, scene = eventful
    handle.stop()
    found = Samples(exposition(run_server()))
    federation = scene.owner.federation.hex()[:16]
    assert found("blindsum_rounds", federation=federation, state="concluded") == 1
    assert found("blindsum_rounds", federation=federation, state="aborted") == 1
    assert found("blindsum_fold_waiting", federation=federation) == 1


def selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector in a parsed query."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "param", "vector_selector"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, (str, int, float)):
            yield from selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from selectors(inner)


def complaints(query: str, found: Samples) -> list[str]:
    """What a query asks for that the server doesn't expose."""
    plain = query.replace("$__range", "1h").replace("$__rate_interval", "5m")
    problems, seen = [], 0
    for selector in selectors(promql_parser.parse(plain)):
        seen += 1
        if selector.name == "up":
            continue
        if selector.name not in found.labels:
            problems.append(f"no metric {selector.name}")
            continue
        have = found.labels[selector.name] | {"instance", "job", "le"}
        asked = {matcher.name for matcher in selector.matchers.matchers}
        problems += [f"{selector.name} has no label {name}" for name in sorted(asked - have)]
    for by in re.findall(r"by \(([^)]*)\)", plain):
        known = set().union(*found.labels.values())
        problems += [f"nothing has the label {n}" for n in re.split(r",\s*", by) if n not in known]
    return problems if seen else ["the query asks for nothing"]


def dashboard_queries() -> list[str]:
    dashboard = json.loads((OPERATIONS / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for variable in dashboard["templating"]["list"]:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
        if match:
            queries.append(f'{match[1]}{{{match[2]}!=""}}')
    return queries


def alarm_queries() -> list[str]:
    (group,) = yaml.safe_load((OPERATIONS / "alarms.yml").read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def test_dashboard_and_alarms_ask_for_what_is_exposed(eventful: tuple[ServerHandle, Scene]) -> None:
    found = Samples(exposition(eventful[0]))
    queries = [*dashboard_queries(), *alarm_queries()]
    assert len(queries) > 50
    assert {query: wrong for query in queries if (wrong := complaints(query, found))} == {}
    # And what they ask for is all that there is of ours, so that nothing is measured for nobody.
    asked = {s.name for q in queries for s in selectors(promql_parser.parse(q.replace("$__range", "1h")))}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in found.labels if "blindsum" in name} - {
        "blindsum_build_info"
    }
    assert ours - {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == set()


def test_a_query_for_what_isnt_there_is_found(eventful: tuple[ServerHandle, Scene]) -> None:
    found = Samples(exposition(eventful[0]))
    for query in (
        "rate(blindsum_roundz_total[5m])",
        'blindsum_rounds{member="clinic-1"}',
        "sum by (member) (blindsum_rounds)",
        "blindsum_rounds / blindsum_roundz",
        "vector(1)",
    ):
        assert complaints(query, found), query


def test_metrics_name_no_member_and_no_secret(eventful: tuple[ServerHandle, Scene]) -> None:
    handle, scene = eventful
    text = exposition(handle)
    secrets = {
        "group key": scene.owner.group_key.secret_bytes().hex(),
        "federation": scene.owner.federation.hex(),
        "owner key": scene.owner.key.public.hex(),
        "admin token": (handle.server.settings.data_dir / "admin.token").read_text().strip(),
        **{member.name: member.name for member in scene.members},
        **{f"identity of {m.name}": m.applicant.identity.public.hex() for m in scene.members},
    }
    assert [what for what, canary in secrets.items() if canary in text] == []
    # The search finds what is there: the short id of the federation is a label.
    assert scene.owner.federation.hex()[:16] in text
    labels = set().union(*Samples(text).labels.values())
    assert labels & {"member", "caller", "peer", "accuracy", "loss", "examples", "text"} == set()


def test_metrics_of_two_servers_dont_mix(run_server: Run, build: Build, tmp_path: Path) -> None:
    one, other = run_server(), run_server(tmp_path / "other")
    scene = build(one)
    scene.members[0].until(lambda r: r.round.state == round_pb2.ROUND_STATE_OPEN)
    label = scene.owner.federation.hex()[:16]
    assert f'federation="{label}"' in exposition(one)
    assert "federation=" not in exposition(other)
