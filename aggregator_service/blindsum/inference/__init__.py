"""The inference service of the cloud: evaluates a tail on features that it can't read."""
