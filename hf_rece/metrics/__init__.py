"""Ranking metrics over the full catalogue, from rank counts."""
