"""The engine behind HTTP: an API that OpenAI's clients speak. `python -m engine.serve --help`."""
