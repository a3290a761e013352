"""The command `python -m engine.calibrate`: a router library from prompts of known domains."""
