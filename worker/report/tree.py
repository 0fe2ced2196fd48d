"""A structured report as lines of plain text, for a person at a terminal. Reads any SR, writes none."""

from __future__ import annotations
