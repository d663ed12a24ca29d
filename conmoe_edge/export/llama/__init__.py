"""Models as llama.cpp knows them: architectures, vocabularies, the GGUF file, its quantised forms."""
