"""What the KV cache knows of its blocks, and which of them it keeps. numpy only."""
