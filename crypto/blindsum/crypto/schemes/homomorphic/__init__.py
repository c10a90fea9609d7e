"""Shared-key homomorphic schemes: bfv, ckks and paillier (protocols.md section 4)."""

from blindsum.crypto.schemes.homomorphic.rounds import scheme

__all__ = ["scheme"]
