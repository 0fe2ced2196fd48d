"""`kill -9`, then nothing lost, nothing twice."""
