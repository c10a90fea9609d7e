"""`blindsum demo`: whole federations on this machine, with real data."""

import json
import shutil
import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from blindsum.crypto.schemes.registry import SCHEME_NAMES
from blindsum.examples.clinics.demo import BITS, N_MAX, ClinicsDemo, Settings
from blindsum.examples.clinics.outcome import WAY_TITLES, WAYS, Outcome
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="A whole federation on this machine, with real data.", no_args_is_help=True)


@app.callback()
def demo() -> None:
    """A whole federation on this machine, with real data."""


@app.command()
def clinics(
    scheme: Annotated[str, typer.Option(help="masking, bfv, ckks or paillier.")] = "masking",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each shared way.")] = 25,
    seed: Annotated[
        int, typer.Option(help="Data split, first model, batch order, rounding; never a key or a mask.")
    ] = 0,
    ways: Annotated[list[str] | None, typer.Option(help="Only these ways; repeat. All by default.")] = None,
    out: Annotated[Path, typer.Option(help="A new or empty folder for everything the demo writes.")] = Path(
        "clinics-demo"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """A hospital and six clinics train a radiograph model through a server that can't read a thing.

    Starts a real aggregator with TLS on loopback and each site as its own process, compares five ways to
    train, checks every sum, searches all that the server saw, and writes report.html.
    """
    if scheme not in SCHEME_NAMES:
        raise typer.BadParameter(f"choose one of {', '.join(SCHEME_NAMES)}", param_hint="--scheme")
    chosen = tuple(way for way in WAYS if ways is None or way in ways)
    unknown = set(ways or ()) - set(WAYS)
    if unknown or not {"fedavg", "personalised"} & set(chosen):
        raise typer.BadParameter(
            f"choose among {', '.join(WAYS)}, at least one of fedavg and personalised", param_hint="--ways"
        )
    _make_room(out)
    console = Console()
    if scheme == "paillier":
        _say_estimate(console, rounds, len({"fedavg", "personalised"} & set(chosen)))
    demo = ClinicsDemo(Settings(scheme, rounds, seed, chosen, out), console)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = demo.run()
    except KeyboardInterrupt:
        console.print("Interrupted; every process of the demo has ended.")
        raise typer.Exit(130) from None
    if json_file is not None:
        json_file.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    _show(console, outcome, out)
    if not outcome.exact or outcome.leak_scan.hits or not outcome.leak_scan.control_hits:
        console.print("[bold red]A check failed: see the report.[/]")
        raise typer.Exit(1)


def _make_room(out: Path) -> None:
    """The demo overwrites what an earlier demo left, and nothing else."""
    mark = out / ".blindsum-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.exists():
            raise typer.BadParameter(
                f"{out} isn't empty and wasn't made by this demo; choose another folder", param_hint="--out"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _say_estimate(console: Console, rounds: int, shared_ways: int) -> None:
    """How long Paillier will take, measured on this machine before it starts."""
    import os  # noqa: PLC0415
    import time  # noqa: PLC0415

    from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters  # noqa: PLC0415
    from blindsum.crypto.schemes.homomorphic.paillier import estimate_seconds  # noqa: PLC0415
    from blindsum.examples.clinics.model import initial_model  # noqa: PLC0415
    from blindsum.examples.clinics.sites import COHORT  # noqa: PLC0415

    parameters = choose_parameters("paillier", BITS["paillier"], N_MAX)
    size = sum(value.numel() for value in initial_model(0).state_dict().values())
    one = estimate_seconds(parameters, size, os.cpu_count() or 1, time.process_time)
    total = one * len(COHORT) * rounds * shared_ways
    console.print(
        f"Paillier is slow for a model of {size:,} parameters: about {total:.0f} s of this run for its "
        "arithmetic alone. Masking or bfv take a few seconds."
    )


def _show(console: Console, outcome: Outcome, out: Path) -> None:
    ways = [way for way in WAYS if all(way in site.accuracy for site in outcome.sites)]
    table = Table(title="Balanced accuracy on the test images, %")
    table.add_column("site", no_wrap=True)
    table.add_column("images", justify="right")
    for way in ways:
        table.add_column(WAY_TITLES[way], justify="right")
    for site in outcome.sites:
        best = max(site.accuracy[way] for way in ways)
        cells: list[Any] = [
            f"[bold green]{100 * value:.1f}[/]"
            if (value := site.accuracy[way]) == best
            else f"{100 * value:.1f}"
            for way in ways
        ]
        table.add_row(site.name, str(site.examples), *cells, end_section=site.name == outcome.sites[-1].name)
    table.add_row("clinic mean", "", *(f"{100 * outcome.mean_of_clinics(way):.1f}" for way in ways))
    console.print(table)
    console.print(outcome.sentence(), soft_wrap=True)
    scan = outcome.leak_scan
    console.print(
        f"\nSums: {'exact, bit for bit, in' if outcome.exact else 'NOT EXACT over'} {outcome.exact_rounds}"
        " rounds"
        f" ({outcome.bytes_up_per_param:.2f} bytes up a parameter)."
        f"\nServer: {scan.files} files, {scan.bytes / 1e6:.0f} MB searched for {len(scan.searched)} forms of"
        f" secrets: {len(scan.hits)} found (the control found {len(scan.control_hits)})."
        f"\nWho would have to collude to learn an update: {outcome.trust_line}"
        f"\nReceipts: `blindsum receipt show {out}/members/hospital/personalised`"
        f"\nReport: {out / 'report.html'}   ({outcome.seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
