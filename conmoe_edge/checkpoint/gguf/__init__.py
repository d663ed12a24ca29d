"""Models in GGUF files, as llama.cpp writes them: headers, names of a plain checkpoint, config and tokenizer."""
