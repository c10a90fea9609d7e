"""`blindsum model` and `blindsum optimize`."""

import importlib
import json
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from blindsum.client.devices.device_profile import read_profile
from blindsum.client.devices.model_exchange import fetch_model, list_models, send_model, trust_in
from blindsum.client.devices.optimising import MAX_DROP, NoCandidate, OptimisationReport, optimise
from blindsum.client.devices.published_model import (
    ModelRefused,
    Optimised,
    Provenance,
    manifest_for,
    open_model,
    publish,
    read_model,
    write_model,
)
from blindsum.client.devices.weights import WEIGHTS, pack_weights, torch_state, unpack_weights
from blindsum.client.federation_view import FederationView
from blindsum.client.terminal import QUICK, Json, MemberPath, console, literal
from rich.table import Table

model_app = typer.Typer(
    help="Publish models, signed and sealed; fetch those of others.", no_args_is_help=True
)
optimize_app = typer.Typer(help="Make a published model fit a device: measure candidates, choose, sign.")


@model_app.command("publish")
def publish_command(
    folder: MemberPath,
    weights: Annotated[Path, typer.Argument(help="The weights: an .npz of arrays by name.")],
    name: Annotated[str, typer.Option(help="The model's name: a-z, 0-9 and hyphens.")],
    number: Annotated[int, typer.Option("--version", min=1, help="Grows with every publication.")],
    network: Annotated[str, typer.Option(help="MODULE:FUNCTION that makes the network for these weights.")],
    training: Annotated[str, typer.Option(help="How it was trained and on what.")],
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Not sealed; the policy must allow open models.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write it here too.")] = None,
) -> None:
    """Sign a model, seal it to the members, and leave it at the aggregator."""
    with np.load(weights, allow_pickle=False) as stored:
        artefact = pack_weights({one: stored[one] for one in stored.files})
    with FederationView.open(folder, patience=QUICK) as view:
        manifest = manifest_for(
            artefact,
            federation=view.roster.federation,
            publisher=view.name,
            name=name,
            version=number,
            created=int(time.time()),
            kind=WEIGHTS,
            provenance=Provenance(
                training=training, network=network, made_with=_tools("numpy", "safetensors")
            ),
        )
        data = publish(
            manifest,
            artefact,
            view.identity,
            group_key=None if open_to_all else view.group_key,
            policy=view.policy,
        )
        send_model(view, data)
    if out is not None:
        write_model(out, data)
    typer.echo(f"Published version {number} of {name}, {len(data)} bytes.")


@model_app.command("list")
def list_command(folder: MemberPath, as_json: Json = False) -> None:
    """The models that the aggregator has."""
    with FederationView.open(folder, patience=QUICK) as view:
        found = list_models(view)
    if as_json:
        rows = [
            {"publisher": one.publisher, "name": one.name, "version": one.version, "bytes": one.total}
            for one in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("publisher", "name", "version", "bytes")
    for one in found:
        table.add_row(literal(one.publisher), literal(one.name), str(one.version), f"{one.total:,}")
    console.print(table)


@model_app.command("fetch")
def fetch_command(
    folder: MemberPath,
    publisher: Annotated[str, typer.Argument(help="The member whose model it is.")],
    name: Annotated[str, typer.Argument(help="The model's name.")],
    out: Annotated[Path, typer.Option(help="Where to write it.")],
    at_least: Annotated[int, typer.Option(min=1, help="Refuse versions older than this.")] = 1,
) -> None:
    """Fetch the newest version of a model, and verify it."""
    with FederationView.open(folder, patience=QUICK) as view:
        data = fetch_model(view, publisher, name, at_least=at_least)
        manifest = open_model(data, trust_in(view, publisher)).manifest
    write_model(out, data)
    typer.echo(f"Version {manifest.version} of {name}, signed by {publisher}, is in {out}.")


@model_app.command("show")
def show_command(
    folder: MemberPath,
    file: Annotated[Path, typer.Argument(help="A published model or an optimised artefact.")],
    publisher: Annotated[str, typer.Option(help="Who has to have signed it.")],
) -> None:
    """Verify a model's file, and show its manifest."""
    with FederationView.open(folder, fetch=False) as view:
        manifest = open_model(read_model(file), trust_in(view, publisher)).manifest
    typer.echo(json.dumps(_plain(manifest), indent=2, sort_keys=True))


@optimize_app.command("optimize")
def optimize_command(
    model: Annotated[Path, typer.Argument(help="A published model, as `blindsum model fetch` wrote it.")],
    member: Annotated[Path, typer.Option(help="The member's folder; its key signs the artefact.")],
    publisher: Annotated[str, typer.Option(help="The member who has to have signed the model.")],
    profile: Annotated[Path, typer.Option(help="The device, a TOML file.")],
    network: Annotated[
        str,
        typer.Option(
            help="MODULE:FUNCTION; called with the weights (torch tensors by name), returns the network, or "
            "networks by width."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help=".npz of local data: inputs and labels held out, and calibration inputs.")
    ],
    out: Annotated[Path, typer.Option(help="Where to write the artefact.")],
    allow_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Points of accuracy that may be lost.")
    ] = 100 * MAX_DROP,
    as_json: Json = False,
) -> None:
    """Build candidates for a device, measure each, and sign the one that fits best.

    A candidate that loses more than a point of accuracy is refused unless --allow-drop says otherwise.
    """
    device = read_profile(profile)
    with FederationView.open(member, fetch=False) as view:
        published = open_model(read_model(model), trust_in(view, publisher))
        if published.manifest.artefact != WEIGHTS:
            raise ModelRefused(f"{model} holds {published.manifest.artefact}; optimise published weights")
        networks = _function(network)(torch_state(unpack_weights(published.artefact)))
        with np.load(data, allow_pickle=False) as stored:
            missing = {"inputs", "labels", "calibration"} - set(stored.files)
            if missing:
                raise ModelRefused(f"{data} has no {', '.join(sorted(missing))}")
            parts = {name: stored[name] for name in ("inputs", "labels", "calibration")}
        try:
            report = optimise(networks, device, max_drop=allow_drop / 100, **parts)
        except NoCandidate as error:
            _show(error.report, as_json)
            raise
        chosen = report.chosen
        assert chosen is not None
        manifest = manifest_for(
            chosen.artefact,
            federation=view.roster.federation,
            publisher=view.name,
            name=published.manifest.name,
            version=published.manifest.version,
            created=int(time.time()),
            kind=chosen.backend,
            provenance=Provenance(
                training=f"optimised from {publisher}'s model",
                network=network,
                parents=(published.manifest.digest,),
                made_with=_tools("torch", "onnx", "onnxscript", "onnxruntime"),
            ),
            optimised=Optimised(
                profile=f"{device.name} ({device.digest[:16]})",
                candidate=chosen.name,
                backend=chosen.backend,
                accuracy=chosen.accuracy,
                accuracy_drop=chosen.accuracy_drop,
                latency_us=chosen.latency_us,
                held_out=report.held_out,
            ),
        )
        signed = publish(
            manifest, chosen.artefact, view.identity, group_key=view.group_key, policy=view.policy
        )
        # What is written is what a device will accept.
        open_model(signed, trust_in(view, view.name))
    write_model(out, signed)
    _show(report, as_json)
    if not as_json:
        console.print(f"Signed by {manifest.publisher}: {out}", highlight=False, soft_wrap=True)


def _show(report: OptimisationReport, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
        return
    table = Table(title=f"{report.profile.name}, {report.held_out} held-out examples")
    for column in ("candidate", "bytes", "of fp32", "latency (p95)", "memory", "accuracy", "drop", "verdict"):
        table.add_column(column, justify="left" if column in ("candidate", "verdict") else "right")
    for one in report.candidates:
        verdict = "; ".join(one.problems) or ("chosen" if one is report.chosen else "fits")
        table.add_row(
            one.name,
            f"{one.size:,}",
            f"{one.size / one.fp32_bytes:.2f}",
            f"{one.latency_us / 1000:.2f} ({one.latency_p95_us / 1000:.2f}) ms",
            f"{one.ram_mb:.0f} MiB",
            f"{100 * one.accuracy:.1f} %",
            f"{100 * one.accuracy_drop:+.1f}",
            verdict,
            style="bold" if one is report.chosen else None,
        )
    console.print(table)
    console.print(report.reason, highlight=False, soft_wrap=True)


def _function(name: str) -> Any:
    module, separator, function = name.partition(":")
    if not separator:
        raise ModelRefused(f"{name!r} isn't MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelRefused(f"{name} can't be imported: {error}") from None
    return found


def _tools(*packages: str) -> dict[str, str]:
    found = {}
    for package in ("blindsum", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """A document for people: digests in hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "__struct_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    return value
