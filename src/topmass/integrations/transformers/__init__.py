"""topmass on unmodified transformers models."""
