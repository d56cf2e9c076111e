"""Prepared sites: arrays, splits and manifest."""
