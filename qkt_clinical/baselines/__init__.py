"""Baselines: ensembles, weight averaging, fine-tuning, unmasked distillation, federations.

Every baseline takes the networks, images and training loop that QKT takes, and does no I/O.
"""
