"""One suite a seam, run on every implementation."""
