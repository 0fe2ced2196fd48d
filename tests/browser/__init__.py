"""Tests that need a browser: `make page`. Their files are not named test_… on purpose: the ordinary suite does not collect them."""
