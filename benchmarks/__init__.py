"""Measurements behind the documentation: scripts that print its tables, run by hand."""
