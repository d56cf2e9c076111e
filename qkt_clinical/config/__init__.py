"""Configuration files: params.yaml, site.yaml, query files, policy.yaml."""
