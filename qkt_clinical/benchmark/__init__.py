"""The benchmark: simulated hospitals from one labelled npz, every method on every query, one table."""
