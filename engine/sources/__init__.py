"""What drafts: one file a source of drafts."""
