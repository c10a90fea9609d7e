"""`blindsum bench`: what a round costs, measured with the real machines and messages."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from blindsum.bench.federation_setup import Work, cohort_class
from blindsum.bench.figures_output import STANDARD_OUTPUT, progress_bar, write_json
from blindsum.bench.machine import cores
from blindsum.crypto.schemes.masking.thresholds import COMPLETE_UP_TO
from rich.console import Console

app = typer.Typer(
    help="Measure schemes: CPU, bytes and memory of whole rounds, with the real machines and messages.",
    no_args_is_help=True,
)


class HeScheme(StrEnum):
    """The homomorphic schemes."""

    BFV = "bfv"
    CKKS = "ckks"
    PAILLIER = "paillier"


class UploadForm(StrEnum):
    """How lattice ciphertexts travel up."""

    SEEDED = "seeded"
    PUBLIC_KEY = "public-key"


class Peer(StrEnum):
    """Whom masking can be compared with."""

    FLWR = "flwr"


Number = TypeVar("Number", int, float)

Members = Annotated[int, typer.Option(min=3, help="Members of the round.")]
Dim = Annotated[int, typer.Option(min=1, help="Parameters of the model.")]
Dropout = Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of members that drop out.")]
Bits = Annotated[int, typer.Option(min=2, max=32, help="Bits of a quantised parameter.")]
NMax = Annotated[
    int | None,
    typer.Option("--n-max", help="Members that the packing must bear; by default 16, 128, 1000, ..."),
]
Modulus = Annotated[int, typer.Option(help="paillier: bits of the modulus, 3072 or 2048.")]
Runs = Annotated[int, typer.Option(min=1, help="Runs; the least time of each figure counts.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads a role; by default all cores.")]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the figures as JSON here; - for standard output.")
]


def _console(json: str | None) -> Console:
    return Console(stderr=json == STANDARD_OUTPUT)


@app.command("masking")
def bench_masking_command(
    members: Members = 10,
    dim: Dim = 100_000,
    dropout: Dropout = 0.0,
    bits: Bits = 16,
    n_max: NMax = None,
    gamma: Annotated[
        int | None,
        typer.Option(
            min=0, max=999, help="Colluding members, per mille; by default 333, above 200 members 50."
        ),
    ] = None,
    delta: Annotated[
        int | None,
        typer.Option(
            min=0, max=999, help="Dropouts to bear, per mille, above 200 members; at least --dropout."
        ),
    ] = None,
    security: Annotated[int, typer.Option(help="80 or 40 bits, above 200 members.")] = 80,
    runs: Runs = 3,
    threads: Threads = None,
    json: Json = None,
    peer: Annotated[
        Peer | None, typer.Option(help="Run this peer's secure aggregation on the same work as well.")
    ] = None,
    peer_runs: Annotated[int, typer.Option(min=1, help="Runs of the peer, at most --runs.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="Where the peer's environment is kept.")] = None,
) -> None:
    """A round of masking: CPU, bytes and memory by role and step, beside AES's limit.

    CPU is user and system time of all threads of the role. A member's figure goes from its float vector to
    its last message, with keys, signatures, quantising and serialising; TLS and the network aren't counted.
    """
    from blindsum.bench.flower_peer import default_cache  # noqa: PLC0415
    from blindsum.bench.masking_round import PeerRequest, bench_masking, show_masking  # noqa: PLC0415

    ring = members > COMPLETE_UP_TO
    work = Work(
        scheme="masking",
        members=members,
        dimension=dim,
        bits=bits,
        n_max=n_max or cohort_class(members),
        dropout=dropout,
        gamma=gamma if gamma is not None else (50 if ring else 333),
        delta=delta if delta is not None else (max(50, round(1000 * dropout)) if ring else 333),
        security=security,
    )
    asked = PeerRequest(cache or default_cache(), peer_runs) if peer else None
    with progress_bar() as progress:
        figures = bench_masking(work, runs, threads or cores(), asked, progress)
    show_masking(figures, _console(json))
    write_json(figures, json)


@app.command("he")
def bench_he_command(
    scheme: Annotated[HeScheme, typer.Option(help="Which scheme.")] = HeScheme.BFV,
    dim: Dim = 1_000_000,
    members: Members = 3,
    bits: Bits = 16,
    n_max: Annotated[
        int | None,
        typer.Option("--n-max", help="Members that the parameter set is proved for; 128 by default."),
    ] = None,
    form: Annotated[
        UploadForm,
        typer.Option(help="bfv, ckks: half-size uploads by who holds the key, or public-key ones."),
    ] = UploadForm.SEEDED,
    modulus: Modulus = 3072,
    dropout: Dropout = 0.0,
    baseline: Annotated[
        bool, typer.Option(help="Measure the CKKS default and textbook Paillier as well.")
    ] = True,
    runs: Runs = 3,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """A round of a homomorphic scheme: bytes, speed, exactness, beside what is widely used today.

    Rates are parameters in a CPU second of all threads of the role; each run has a fresh key.
    """
    from blindsum.bench.he_frames import bench_he, show_he  # noqa: PLC0415

    work = Work(
        scheme=scheme.value,
        members=members,
        dimension=dim,
        bits=bits,
        n_max=n_max or max(128, cohort_class(members)),
        dropout=dropout,
        form=form.value,
        modulus_bits=modulus,
    )
    with progress_bar() as progress:
        figures = bench_he(work, runs, threads or cores(), baseline, progress)
    show_he(figures, _console(json))
    write_json(figures, json)


@app.command("tail")
def bench_tail_command(
    images: Annotated[int, typer.Option(min=1, max=624, help="Test images to ask about.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Which of the clinics' tails to train.")] = 0,
    json: Json = None,
) -> None:
    """An encrypted answer of the inference service: CPU, bytes, round trip, beside TenSEAL's mm."""
    from blindsum.bench.tail_service import bench_tail, show_tail  # noqa: PLC0415

    with progress_bar() as progress:
        figures = bench_tail(images, seed, progress)
    show_tail(figures, _console(json))
    write_json(figures, json)


@app.command("all")
def bench_all_command(
    sizes: Annotated[
        str, typer.Option(help="Parameters of the models, separated by commas.")
    ] = "10000,100000,1000000,10000000",
    members: Members = 5,
    bits: Bits = 16,
    n_max: NMax = None,
    bandwidths: Annotated[
        str, typer.Option(help="A member's Mbit/s each way, separated by commas.")
    ] = "10,50,100,1000",
    paillier_max: Annotated[
        int, typer.Option(min=1, help="Largest model that paillier is run on; above, it is scaled up.")
    ] = 100_000,
    modulus: Modulus = 3072,
    runs: Runs = 3,
    threads: Threads = None,
    json: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write the comparison as one HTML page here.")] = None,
) -> None:
    """Every scheme, and no protection at all, on the same vectors and machine: table, JSON, HTML page."""
    from blindsum.bench.comparison import bench_all, show_all  # noqa: PLC0415

    work = Work(
        scheme="masking",
        members=members,
        dimension=1,
        bits=bits,
        n_max=n_max or cohort_class(members),
        modulus_bits=modulus,
    )
    with progress_bar() as progress:
        figures = bench_all(
            work,
            _numbers(sizes, "--sizes", int),
            _numbers(bandwidths, "--bandwidths", float),
            runs,
            threads or cores(),
            paillier_max,
            progress,
        )
    command = (
        f"blindsum bench all --sizes {sizes} --members {members} --bits {bits} --n-max {work.n_max} "
        f"--bandwidths {bandwidths} --paillier-max {paillier_max} --modulus {modulus} "
        f"--runs {runs}"
    )
    figures["command"] = command
    show_all(figures, _console(json))
    write_json(figures, json)
    if html is not None:
        from blindsum.bench.comparison_page import write_page  # noqa: PLC0415

        write_page(figures, html, command)


@app.command("ingest")
def bench_ingest_command(
    uploads: Annotated[
        str, typer.Option(help="What is sent, as MB:members; members in multiples of 16, the folder's batch.")
    ] = "4:64,40:16",
    at_once: Annotated[int, typer.Option(min=1, help="Uploads at the same time.")] = 8,
    directory: Annotated[
        Path | None, typer.Option(help="Whose disk the server writes to; the system's temporary directory.")
    ] = None,
    json: Json = None,
) -> None:
    """Durable uploads over mutual TLS: MB per CPU second of the server, beside a raw TLS receiver.

    The CPU of all server processes is counted, from the first chunk until the last upload is acknowledged
    and added to the sum.
    """
    from blindsum.bench.ingest import bench_ingest, show_ingest  # noqa: PLC0415

    sizes = {}
    for pair in uploads.split(","):
        numbers = _numbers(pair.replace(":", ","), "--uploads", int)
        if len(numbers) != 2:
            raise typer.BadParameter("--uploads takes MB:members, as in 4:32,40:16")
        sizes[numbers[0]] = numbers[1]
    with progress_bar() as progress:
        figures = bench_ingest(sizes, at_once, directory, progress)
    show_ingest(figures, _console(json))
    write_json(figures, json)


@app.command("commits")
def bench_commits_command(
    in_flight: Annotated[int, typer.Option(min=1, help="Acknowledgements that wait at the same time.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each kind runs.")] = 6.0,
    directory: Annotated[
        Path | None, typer.Option(help="Whose disk is measured; the system's temporary directory.")
    ] = None,
    json: Json = None,
) -> None:
    """Durable acknowledgements: how many share a commit, beside a bare loop of commits on the same disk."""
    from blindsum.bench.commits import bench_commits, show_commits  # noqa: PLC0415

    with progress_bar() as progress:
        figures = bench_commits(in_flight, seconds, directory, progress)
    show_commits(figures, _console(json))
    write_json(figures, json)


@app.command("round")
def bench_round_command(
    members: Annotated[int, typer.Option(min=3, help="Members of the federation.")] = 7,
    dim: Dim = 24_000,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is apart.")] = 8,
    directory: Annotated[
        Path | None, typer.Option(help="Where everyone's files lie; the system's temporary directory.")
    ] = None,
    json: Json = None,
) -> None:
    """Masking rounds on the clock: a server process and members of the SDK on loopback, training apart."""
    from blindsum.bench.round_wall import bench_round, show_round  # noqa: PLC0415

    with progress_bar() as progress:
        figures = bench_round(members, dim, rounds, directory, progress)
    show_round(figures, _console(json))
    write_json(figures, json)


def _numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise typer.BadParameter(f"{option} takes positive numbers separated by commas, as in 100,1000")
    return found
