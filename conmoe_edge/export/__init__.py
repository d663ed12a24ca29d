"""A package in the forms that other engines read: a plain checkpoint, GGUF."""
