"""Reports out to a PACS, and back to be sure."""
