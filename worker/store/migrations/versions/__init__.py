"""One file a revision, frozen once released."""
