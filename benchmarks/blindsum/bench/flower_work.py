"""Flower's SecAgg+ on one vector: run by the Python of an environment that has flwr, and nothing of ours.

    python flower_work.py '{"members": 10, "dim": 1000, "bits": 16, "dropped": 0, "shares": 7}'

Its own workflow and client mod run against a grid in this process. Each side's messages go through
Flower's own protobuf serialisation, charged apart. Prints one line of JSON. Averaging by a strategy, and
turning a model into Flower's parameters, aren't charged: they are no part of the protocol.
"""

import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np

EXAMPLES = 100
CLIPPING = 2.0

app = import_module("flwr.app")
common = import_module("flwr.common")
compat = import_module("flwr.compat.common.recorddict_compat")
serde = import_module("flwr.common.serde")
server = import_module("flwr.server")
strategies = import_module("flwr.server.strategy")
client_manager = import_module("flwr.server.client_manager")
legacy_context = import_module("flwr.server.compat.legacy_context")
workflows = import_module("flwr.server.workflow")
workflow_constant = import_module("flwr.server.workflow.constant")
identity = import_module("flwr.supercore.task_identity").TaskIdentity
secaggplus_mod = import_module("flwr.client.mod").secaggplus_mod


def _update(index: int, dimension: int) -> Any:
    generator = np.random.default_rng(1 + index)
    return generator.standard_normal(dimension, np.float32) * np.float32(0.25)


class _Proxy:
    """What the workflow asks of a client's proxy."""

    def __init__(self, node_id: int) -> None:
        self.cid = str(node_id)
        self.node_id = node_id


class _Grid:
    """Hands each message to its member's mod, and charges both sides."""

    def __init__(self, work: dict[str, int]) -> None:
        self._work = work
        self._contexts: dict[int, Any] = {}
        self._stage = 0
        self.away = 0.0
        self.member: dict[int, float] = defaultdict(float)
        self.member_serialising: dict[int, float] = defaultdict(float)
        self.server_serialising = 0.0
        self.bytes_up: dict[int, int] = defaultdict(int)
        self.uploaded: list[int] = []
        self._outside = 0.0

    def send_and_receive(self, messages: Iterable[Any], timeout: float | None = None) -> list[Any]:
        """Replies of all members that haven't dropped out."""
        del timeout
        start = time.process_time()
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            if self._stage >= 2 and node > self._work["members"] - self._work["dropped"]:
                continue
            replies.append(self._ask(node, message))
        self._stage += 1
        self.away += time.process_time() - start
        return replies

    def _ask(self, node: int, message: Any) -> Any:
        clock = time.process_time
        begin = clock()
        raw = serde.recorddict_to_proto(message.content).SerializeToString()
        self.server_serialising += clock() - begin

        begin = clock()
        message.content = _parse(raw)
        self.member_serialising[node] += clock() - begin

        self._outside = 0.0
        begin = clock()
        reply = secaggplus_mod(message, self._context(node), self._train)
        self.member[node] += clock() - begin - self._outside

        begin = clock()
        raw = serde.recorddict_to_proto(reply.content).SerializeToString()
        self.member_serialising[node] += clock() - begin
        self.bytes_up[node] += len(raw)
        if self._stage == 2:
            self.uploaded.append(node)

        begin = clock()
        reply.content = _parse(raw)
        self.server_serialising += clock() - begin
        return reply

    def _train(self, message: Any, context: Any) -> Any:
        """The app: its update is there already."""
        del context
        begin = time.process_time()
        node = message.metadata.dst_node_id
        parameters = common.ndarrays_to_parameters([_update(node - 1, self._work["dim"])])
        status = common.Status(common.Code.OK, "")
        result = common.FitRes(status, parameters, EXAMPLES, {})
        reply = app.Message(compat.fitres_to_recorddict(result, keep_input=False), reply_to=message)
        self._outside += time.process_time() - begin
        return reply

    def _context(self, node: int) -> Any:
        if node not in self._contexts:
            self._contexts[node] = _new_context(node)
        return self._contexts[node]


def _parse(raw: bytes) -> Any:
    return serde.recorddict_from_proto(import_module("flwr.proto.recorddict_pb2").RecordDict.FromString(raw))


def _new_context(node: int) -> Any:
    return app.Context(run_id=1, node_id=node, node_config={}, state=app.RecordDict(), run_config={})


def main() -> None:
    """Runs the round that the argument describes."""
    work = json.loads(sys.argv[1])
    logging.getLogger("flwr").setLevel(logging.ERROR)
    members, dimension = work["members"], work["dim"]
    identity.run_id, identity.node_id, identity.task_id = 1, 0, 1

    class Average(strategies.FedAvg):  # type: ignore[name-defined, misc]
        """Takes the opened mean as it is."""

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            del server_round, failures
            return results[0][1].parameters, {}

    manager = client_manager.SimpleClientManager()
    for node in range(1, members + 1):
        manager.register(_Proxy(node))
    strategy = Average(fraction_fit=1.0, min_fit_clients=members, min_available_clients=members)
    context = legacy_context.LegacyContext(
        _new_context(0), server.ServerConfig(num_rounds=1), strategy, manager
    )
    start_model = common.ndarrays_to_parameters([np.zeros(dimension, np.float32)])
    context.state.array_records[workflow_constant.MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        start_model, keep_input=False
    )
    context.state.config_records[workflow_constant.MAIN_CONFIGS_RECORD] = app.ConfigRecord(
        {workflow_constant.Key.CURRENT_ROUND: 1}
    )
    workflow = workflows.SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=work["shares"],
        max_weight=float(EXAMPLES),
        clipping_range=CLIPPING,
        quantization_range=1 << work["bits"],
    )
    grid = _Grid(work)
    start = time.process_time()
    workflow(grid, context)
    spent = time.process_time() - start - grid.away
    mean = _opened(context)
    expected = np.mean(
        [np.clip(_update(node - 1, dimension), -CLIPPING, CLIPPING) for node in grid.uploaded],
        axis=0,
        dtype=np.float64,
    )
    print(
        json.dumps(
            {
                "version": version("flwr"),
                "member_cpu_s": median(grid.member[node] for node in grid.uploaded),
                "member_serialising_cpu_s": median(grid.member_serialising[node] for node in grid.uploaded),
                "aggregator_cpu_s": spent,
                "aggregator_serialising_cpu_s": grid.server_serialising,
                "bytes_up": median(grid.bytes_up[node] for node in grid.uploaded),
                "max_error": float(np.abs(mean - expected).max()),
            }
        )
    )


def _opened(context: Any) -> Any:
    record = context.state.array_records[workflow_constant.MAIN_PARAMS_RECORD]
    parameters = compat.arrayrecord_to_parameters(record, keep_input=True)
    return common.parameters_to_ndarrays(parameters)[0]


if __name__ == "__main__":
    main()
