"""Figures; each prints one JSON line."""
