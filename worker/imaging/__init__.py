"""Files → volumes: read, decoded, checked and put in order. Nothing here knows the network, the record or the store."""
