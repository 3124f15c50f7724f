"""Measurements of an engine as its users meet it: latency, throughput, serving under load, the host's own work."""
