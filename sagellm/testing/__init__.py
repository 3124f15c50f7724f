"""For authors of passes and backends: checks against the reference meaning, and a reference lowering."""
