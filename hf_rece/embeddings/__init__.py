"""Tables that are both input lookup and output rows."""
