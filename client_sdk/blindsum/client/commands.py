"""The members' and the owner's part of the command `blindsum`: owner, join, member, train, receipt."""

from blindsum.client.member_commands import join_app, member_app, member_run
from blindsum.client.owner_commands import owner_app, policy_app
from blindsum.client.receipt_commands import receipt_app
from blindsum.client.train_commands import train_app

__all__ = ["join_app", "member_app", "member_run", "owner_app", "policy_app", "receipt_app", "train_app"]
