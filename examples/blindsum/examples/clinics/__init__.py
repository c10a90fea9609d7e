"""The running example: one hospital and its clinics learn to read radiographs together.

`sites` holds who has which images, `model` the network, `training` one site's gradient steps, `ways` the ways
to train and infer that the demo compares.
"""
