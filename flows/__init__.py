"""The orchestration: Prefect flows, deployments, the command line and the local stack."""
