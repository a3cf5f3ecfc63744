"""Routing rules compared on simulated Ollama machines: those of others, and this gateway. `make bench-fleet`."""
