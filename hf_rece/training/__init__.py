"""Trainer for models with huge vocabularies."""
