"""The command `sage`."""
