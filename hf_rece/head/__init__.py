"""The output layer of any causal or masked LM, replaced by a loss that never builds logits."""

from hf_rece.head.large_vocab_head import LargeVocabHead
from hf_rece.head.replace import (
    find_head,
    replace_output_head,
    restore_output_head,
)

__all__ = ["LargeVocabHead", "find_head", "replace_output_head", "restore_output_head"]
