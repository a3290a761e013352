"""The operations of a round, from the rows of a pass to the tokens that were accepted."""
