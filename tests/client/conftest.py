from blindsum.client.pytest_plugin import blindsum_federation

__all__ = ["blindsum_federation"]
