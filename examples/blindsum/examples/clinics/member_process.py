"""One site of the demo, a process of its own: `python -m blindsum.examples.clinics.member_process SITE`.

It uses only the public SDK, as an app at a clinic would. The demo tells it what to do next by JSON lines on
standard input, and it says what happened by JSON lines on standard output; updates, counts and losses
go to no one but the SDK. It ends when standard input is closed.
"""

import argparse
import hashlib
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from blindsum.client import Member, Patience, join, wait_for_admission
from blindsum.examples.clinics.model import RadiographNet
from blindsum.examples.clinics.sites import HOSPITAL, load_site, load_test
from blindsum.examples.clinics.training import TrainingPlan, balanced_accuracy
from blindsum.examples.clinics.ways import (
    Way,
    local_round,
    part_of,
    shared_state,
    start_model,
    take_shared,
    train_alone,
    way_named,
)

_output = threading.Lock()


def say(event: str, **values: Any) -> None:
    """One JSON line to the demo."""
    with _output:
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


def rounding_seed(seed: int, site: str) -> bytes:
    """The demo's stochastic-rounding stream: it feeds nothing else, never a key or a mask."""
    return hashlib.sha256(f"blindsum demo rounding/{seed}/{site}".encode()).digest()


class PhaseClock:
    """Seconds by phase of the running round, from the SDK's progress calls."""

    def __init__(self, way: str) -> None:
        self._way = way
        self._lock = threading.Lock()
        self._phase = "waiting"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._training = False

    def train(self, training: bool) -> None:
        """While the app trains, steps are answered beside it: that time counts as training."""
        with self._lock:
            self._training = training
            self._switch("training" if training else "protect")
        say("phase", way=self._way, phase="training" if training else "protect")

    def __call__(self, phase: str, *_: int) -> None:
        """Note the phase; tell the demo when it changes."""
        with self._lock:
            changed = phase != self._phase and not self._training
            if changed:
                self._switch(phase)
        if changed:
            say("phase", way=self._way, phase=phase)

    def _switch(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        with self._lock:
            self._switch(self._phase)
            seconds, self._seconds = self._seconds, {}
        return {phase: round(value, 4) for phase, value in seconds.items()}


class Site:
    """A site with its data, its models by way, and its member folders."""

    def __init__(self, name: str, folder: Path, published: Path, seed: int, plan: TrainingPlan) -> None:
        self.name = name
        self._folder = folder
        self._published = published
        self._seed = seed
        self._plan = plan
        self._data = load_site(name, seed)
        self._models: dict[str, RadiographNet] = {}

    def join(self, invitation: Path, federation: str) -> None:
        """Make keys on this device and wait until the owner has admitted them."""
        folder = self._folder / federation
        join(invitation, folder, organisation=self.name)
        wait_for_admission(folder, patience=Patience(first=0.2, longest=1.0, total=None))

    def together(self, way: Way, federation: str) -> None:
        """Train with the others through the aggregator, until the plan is finished."""
        model = start_model(way, self._seed)
        clock = PhaseClock(way.name)
        folder = self._folder / federation
        rounding = rounding_seed(self._seed, self.name)
        with Member.open(folder, on_progress=clock, witness=True, rounding_seed=rounding) as member:
            for rnd in member.rounds():
                clock.train(True)
                take_shared(model, way, rnd.weights())
                log = local_round(
                    model, self._data, way, seed=self._seed, round_number=rnd.index, plan=self._plan
                )
                clock.train(False)
                done = rnd.submit(
                    shared_state(model, way),
                    examples=len(self._data.train),
                    metrics={"loss": log.loss},
                )
                say(
                    "round",
                    way=way.name,
                    number=done.round,
                    count=rnd.index,
                    survivors=done.survivors,
                    check=done.receipt.sum_check,
                    h1=done.receipt.h1.hex(),
                    max_error=done.max_error,
                    trust=done.trust,
                    seconds=clock.take(),
                    validation=balanced_accuracy(model, self._data.validation),
                )
            take_shared(model, way, member.latest_state())
        self._models[way.name] = model

    def newcomer(self, way: Way, federation: str) -> None:
        """Take the model that the others trained, and fit a head of one's own where the way has one."""
        model = start_model(way, self._seed)
        with Member.open(self._folder / federation) as member:
            take_shared(model, way, member.latest_state())
        train_alone(model, self._data, way, seed=self._seed, plan=self._plan)
        self._models[way.name] = model

    def alone(self, way: Way) -> None:
        """Train here without sharing; the hospital then publishes its model for the cloud ways."""
        model = start_model(way, self._seed)
        train_alone(model, self._data, way, seed=self._seed, plan=self._plan)
        self._models[way.name] = model
        if self.name == HOSPITAL and way.name == "edge_only":
            aside = self._published.with_suffix(".new")
            torch.save(model.state_dict(), aside)
            aside.rename(self._published)

    def from_hospital(self, way: Way) -> None:
        """Take the hospital's published model, and fine-tune it here where the way says so."""
        state = torch.load(self._published, weights_only=True)
        model = start_model(way, self._seed, state)
        if part_of(way, self.name) != "receives":
            train_alone(model, self._data, way, seed=self._seed, plan=self._plan)
        self._models[way.name] = model

    def accuracies(self) -> dict[str, float]:
        """Balanced accuracy on the test images by way: loaded here, once, after all training."""
        test = load_test(self.name, self._seed)
        return {way: balanced_accuracy(model, test) for way, model in self._models.items()}


def _read_orders(orders: queue.Queue[dict[str, str]]) -> None:
    """Orders from standard input; its end is the demo's end, in whatever this process is."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def main() -> None:
    """Do what the demo says, until it closes standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("site")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    site = Site(given.site, given.folder, given.published, given.seed, TrainingPlan(rounds=given.rounds))
    say("ready", examples=len(load_site(given.site, given.seed).train))
    orders: queue.Queue[dict[str, str]] = queue.Queue()
    threading.Thread(target=_read_orders, args=(orders,), daemon=True).start()
    while True:
        order = orders.get()
        what = order["do"]
        if what == "join":
            site.join(Path(order["invitation"]), order["federation"])
        elif what == "together":
            site.together(way_named(order["way"]), order["federation"])
        elif what == "newcomer":
            site.newcomer(way_named(order["way"]), order["federation"])
        elif what == "alone":
            site.alone(way_named(order["way"]))
        elif what == "from_hospital":
            site.from_hospital(way_named(order["way"]))
        elif what == "evaluate":
            say("accuracies", accuracy=site.accuracies())
        say("done", order=order)


if __name__ == "__main__":
    main()
