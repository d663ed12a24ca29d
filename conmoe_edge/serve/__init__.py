"""An OpenAI-compatible server for one package, with a page to talk to it. Closed by default."""
