"""The policies as optimizers."""
