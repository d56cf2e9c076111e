"""Networks, and the files in which they travel."""
