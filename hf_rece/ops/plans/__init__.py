"""One file a plan: which pairs a loss scores."""
