"""The Containerfile, compose.yaml and the runbook's installation, by real engines: `make container`, `make runbook`."""
