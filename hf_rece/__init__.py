"""Train recommenders and language models with huge output vocabularies, without the logits."""

from hf_rece.version import __version__

__all__ = ["__version__"]
