"""No sockets, no sleeping."""
