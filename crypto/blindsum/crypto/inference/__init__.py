"""Inference on an encrypted feature: a small tail of a network, evaluated by a server that can't see its
input.
"""
