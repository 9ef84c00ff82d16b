"""Model families, one module each, because importing one of vLLM's pulls in what only that family needs."""
