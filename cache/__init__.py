"""The feature store; loads no torch, ray or prefect."""
