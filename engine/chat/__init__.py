"""The command `python -m engine.chat`: one answer, or a conversation."""
