"""Engines by their kind."""
