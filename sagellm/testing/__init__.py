"""For authors of passes and backends: FileCheck tests that run in process (see `plugin`)."""
