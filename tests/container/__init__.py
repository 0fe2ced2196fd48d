"""The Containerfile, compose.yaml and the runbook's installation, by real engines: `make container`, `make runbook`.

Where the machine itself is a sandbox that may raise no limit, or has control groups of both versions, podman needs a file named by
$CONTAINERS_CONF: ``[engine]`` ``runtime = "runc"``; ``[containers]`` ``default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]``.
"""
