"""The engine: a core that speaks token ids, and a front with tokenizer and stop strings."""
