"""For authors of passes and backends: FileCheck tests that run in process (`plugin`), and the op-per-request lowering
(`requests`). Whether a pass keeps what a graph means is checked by `sagellm.meaning`."""
