"""`synoptic demo`: a small PACS and phantom patients."""
