"""vLLM in the serving environment (`make serve-env`): its processes, its server, and requests to it. No torch."""
