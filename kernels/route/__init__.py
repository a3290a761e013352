"""The operations of the router: the state of a prompt, and the anchor nearest to it."""
