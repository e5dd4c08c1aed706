"""The science of EUPE distillation; knows nothing of storage, Ray or Prefect."""
