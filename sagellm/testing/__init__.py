"""For authors of passes and backends: FileCheck tests that run in process (`plugin`), checks of passes against the
operations' meaning (`reference`), and the op-per-request lowering (`requests`)."""
