"""Hospitals to try things on: generated, or a public data set divided."""
