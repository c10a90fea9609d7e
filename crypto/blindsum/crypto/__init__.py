"""Blindsum's protocols and primitives, sans-IO: no sockets, files, clocks, threads, logs or torch.

`schemes` holds the protocols behind one interface, `trust` what the owner signs and what members
check, `encoding` the way from floats to integer fields and back, `primitives` thin layers over
well-kept libraries.
"""
