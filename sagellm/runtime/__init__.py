"""Executes plans and knows no xDSL."""
