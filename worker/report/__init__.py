"""Findings, written so that a PACS, a viewer and a radiologist can read them."""
