"""Hospitals for trials: generated, or from a divided public data set."""
