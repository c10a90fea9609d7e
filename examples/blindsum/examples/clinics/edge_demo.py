"""`blindsum demo edge`: the four ways of edge AI, one after the other, on the clinics.

1. Training together, next to local training, the cloud's model and plain FedAvg: the whole of `demo clinics`.
2. Cloud training, edge inference: the hospital publishes its model through the running aggregator, a clinic
   fetches it and makes it fit a device.
3. Hard and unknown examples: clinics forward a few, sealed and with consent; the hospital learns from them
   and publishes the next version.
4. Collaborative inference: a tiny edge model asks the cloud in doubt, encrypted; and an attacker is given all
   that the server holds.
"""

import time
from dataclasses import dataclass, field

import torch
from blindsum.client.federation_view import FederationView
from blindsum.examples.clinics.collaborative_inference import run_collaborative_inference
from blindsum.examples.clinics.demo import ClinicsDemo, Settings
from blindsum.examples.clinics.device_models import DeviceOutcome, device_models, publish_hospital_model
from blindsum.examples.clinics.edge_outcome import EdgeOutcome
from blindsum.examples.clinics.edge_report import write_edge_report
from blindsum.examples.clinics.hard_examples import HardOutcome, hard_examples
from blindsum.examples.clinics.sites import COHORT, HOSPITAL
from rich.console import Console
from rich.text import Text

FEDERATION = "personalised"
"""Of the demo's two federations, the one through which models and examples travel."""


@dataclass
class EdgeDemo:
    """One run of the demo. Everything that it starts has ended when `run` returns."""

    settings: Settings
    console: Console
    _started: float = field(default_factory=time.monotonic)
    _devices: DeviceOutcome | None = None
    _hard: HardOutcome | None = None

    def run(self) -> EdgeOutcome:
        """All four ways, and the report."""
        clinics = ClinicsDemo(self.settings, self.console, while_served=self._publish_and_forward).run()
        assert self._devices is not None
        assert self._hard is not None
        self._say("collaborative inference: a service of the cloud's, asked with encrypted features")
        inference = run_collaborative_inference(
            self.settings.seed, self.settings.folder / "inference", report=self._say
        )
        outcome = EdgeOutcome(clinics, self._devices, self._hard, inference, time.monotonic() - self._started)
        write_edge_report(outcome, self.settings.folder / "report.html")
        return outcome

    def _publish_and_forward(self) -> None:
        """With the aggregator still up, and every site's process ended so that its folder is free."""
        out, seed = self.settings.folder, self.settings.seed
        folders = {site: out / "members" / site / FEDERATION for site in COHORT}
        state = torch.load(out / "hospital-model.pt", weights_only=True)
        self._say("the hospital signs its model, seals it to the members, and publishes it")
        with FederationView.open(folders[HOSPITAL]) as view:
            publish_hospital_model(state, 1, view, "the hospital's own images")
        work = out / "device"
        work.mkdir()
        self._say("a clinic fetches the model and measures what fits its device")
        self._devices = device_models(folders, seed=seed, work=work)
        self._hard = hard_examples(state, folders, seed=seed, work=work, on_step=self._say)

    def _say(self, text: str) -> None:
        seconds = int(time.monotonic() - self._started)
        self.console.print(Text(f"{seconds // 60}:{seconds % 60:02d}  {text}"), soft_wrap=True)
