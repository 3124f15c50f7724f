"""The real torch_npu on a machine without an NPU: over stand-ins for CANN that are derived from its own wheel."""
