"""MLflow: runs, versions, registry."""
