"""From a float vector to integer fields and back (protocols.md 2): the one place that every scheme uses."""
