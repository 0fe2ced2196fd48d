"""``python -m worker`` is ``synoptic``."""

from worker.cli import main

main()
