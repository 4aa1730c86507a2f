"""Schemes, and how weights are brought into each of them."""
