"""What an app embeds: take part in a federation (`Member`), or own one (`Owner`).

from blindsum.client import Member

member = Member.open("clinic-3/")               # keys were made here by `blindsum join`
for rnd in member.rounds():                      # waits, reconnects, resumes, verifies policy and model
    model.load_state_dict(rnd.weights())
    loss = train(model, loader)
    receipt = rnd.submit(model.state_dict(), examples=len(data), metrics={"loss": loss})
"""

from blindsum.client.joining import join, wait_for_admission
from blindsum.client.member import Member
from blindsum.client.owner import Owner
from blindsum.client.private_files import FolderError, FolderInUse
from blindsum.client.receipts import RoundReceipt
from blindsum.client.training_round import Round
from blindsum.client.transport import Patience, Unreachable

__all__ = [
    "FolderError",
    "FolderInUse",
    "Member",
    "Owner",
    "Patience",
    "Round",
    "RoundReceipt",
    "Unreachable",
    "join",
    "wait_for_admission",
]
