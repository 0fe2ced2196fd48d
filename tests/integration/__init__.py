"""Real sockets, real processes, real peers."""
