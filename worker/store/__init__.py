"""The only place that speaks SQL, and the spool beside it."""
