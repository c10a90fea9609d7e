"""`blindsum receipt`: show and verify what a member's rounds were."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from blindsum.client.member_folder import MemberFolder
from blindsum.client.receipts import RoundReceipt, gaps, known_rosters, verify_receipts
from blindsum.client.terminal import Json, MemberPath, console, literal, say, show
from blindsum.crypto.errors import DocumentError
from blindsum.crypto.trust.receipt import Receipt
from blindsum.crypto.trust.roster import Roster
from rich.table import Table

receipt_app = typer.Typer(help="Show and verify what a member's rounds were.", no_args_is_help=True)


@receipt_app.command("show")
def receipt_show(
    folder: MemberPath,
    number: Annotated[int | None, typer.Option("--round", help="Only this round, in full.")] = None,
    as_json: Json = False,
) -> None:
    """What happened in each round: how many members, which scheme, who could learn an update."""
    with MemberFolder(folder, read_only=True) as opened:
        receipts = [RoundReceipt.of(stored) for stored in opened.receipts()]
    if number is not None:
        receipts = [receipt for receipt in receipts if receipt.round == number]
        if not receipts:
            raise DocumentError(f"there is no receipt of round {number} in {folder}")
    if as_json:
        show([_receipt_json(receipt) for receipt in receipts])
        return
    if number is not None:
        table = Table(show_header=False)
        for name, value in _receipt_json(receipts[0]).items():
            table.add_row(name.replace("_", " "), literal(value))
        console.print(table)
        return
    table = Table("round", "scheme", "members", "sum check", "transcript")
    for one in receipts:
        table.add_row(
            str(one.round), one.receipt.scheme, str(one.survivors), one.receipt.sum_check, one.transcript[:16]
        )
    console.print(table)
    if receipts:
        say(f"Who would have to collude to learn an update: {receipts[-1].trust}")


def _receipt_json(one: RoundReceipt) -> dict[str, Any]:
    receipt = one.receipt
    fields = {name: getattr(receipt, name) for name in receipt.__struct_fields__}
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}
    return {**plain, "transcript": one.transcript, "metrics": dict(one.metrics), "max_error": one.max_error}


@receipt_app.command("export")
def receipt_export(
    folder: MemberPath, out: Annotated[Path, typer.Option(help="Where to write the signed receipts.")]
) -> None:
    """Write this member's signed receipts, for someone else to verify. They hold no secret and no metric."""
    with MemberFolder(folder, read_only=True) as opened:
        out.write_text(json.dumps([stored.body.hex() for stored in opened.receipts()]))
    say(f"Written to {out}.")


@receipt_app.command("verify")
def receipt_verify(
    folder: MemberPath,
    others: Annotated[list[Path] | None, typer.Argument(help="Exported receipts of other members.")] = None,
) -> None:
    """Check signatures and the chain of all receipts, here and in other members' exports."""
    with MemberFolder(folder, read_only=True) as opened:
        known = known_rosters(opened)
        own = [one.body for one in opened.receipts()]
    found = _verify(str(folder), own, known)
    for path in others or ():
        try:
            bodies = [bytes.fromhex(line) for line in json.loads(path.read_text())]
        except (ValueError, TypeError):
            raise DocumentError(f"{path} isn't an export of receipts") from None
        _verify(str(path), bodies, known)
        verify_receipts([*own, *bodies], known)
    if found and others:
        say("All of them tell the same history.")


def _verify(name: str, bodies: list[bytes], known: list[Roster]) -> list[Receipt]:
    receipts = verify_receipts(bodies, known)
    if not receipts:
        say(f"{name}: no receipts yet")
        return []
    missing = gaps(receipts)
    text = f"; not seen through: something before round {', '.join(map(str, missing))}" if missing else ""
    say(f"{name}: {len(receipts)} receipts verified, transcript {receipts[-1].transcript().hex()[:16]}{text}")
    return receipts
