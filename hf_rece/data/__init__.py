"""Interaction logs in, token sequences out."""
