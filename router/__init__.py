"""Chooses a draft plan for a prompt from its hidden state: feature, plan library, neighbour."""
