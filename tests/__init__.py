"""Every test opens real things: databases, sockets, processes, peers."""
