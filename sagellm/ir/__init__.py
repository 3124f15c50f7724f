"""The language: dialects, `IRGraph`, build, edit and check helpers, and the meaning of every operation."""
