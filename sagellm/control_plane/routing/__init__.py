"""Which engine a request goes to: filters, strategies, and why. No HTTP, no event loop, no clock of its own."""
