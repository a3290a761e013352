"""Chooses a draft plan for a prompt from its hidden state: prompt feature, plan library, neighbour.

Nothing lives here yet: every prompt is decoded by the full model.
"""
