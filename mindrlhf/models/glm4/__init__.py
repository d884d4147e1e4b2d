"""GLM-4 models."""
