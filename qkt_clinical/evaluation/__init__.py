"""Figures on held-out images, and the gate that judges them."""
