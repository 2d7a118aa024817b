"""The names that users import."""

import subprocess
import sys
from importlib.util import find_spec

import hf_rece

CONTRACT = {
    *("cross_entropy_loss", "rece_loss", "sce_loss", "stratified_loss", "sampled_softmax_loss"),
    *("bce_loss", "gbce_loss", "CrossEntropyConfig", "RECEConfig", "SCEConfig", "StratifiedConfig"),
    *("SampledSoftmaxConfig", "BCEConfig", "GBCEConfig", "build_loss", "SASRecConfig"),
    *("SASRecModel", "RecommenderConfig", "RecommenderModel", "ItemTokenizer", "load_interactions"),
    *("leave_one_out_split", "temporal_split", "LargeVocabTrainer", "LargeVocabTrainingArguments"),
    *("RecommenderTrainer", "RecommenderTrainingArguments", "DynamicSparsityCallback"),
    *("CompositionalEmbedding", "LMAEmbedding", "LargeVocabHead"),
    *("replace_output_head", "restore_output_head"),
}
NEEDS_TRL = {"LargeVocabSFTConfig", "LargeVocabSFTTrainer"}


def test_every_name_of_the_contract_is_there():
    assert not CONTRACT - set(hf_rece.__all__)
    without_trl = set() if find_spec("trl") else NEEDS_TRL
    assert all(getattr(hf_rece, name) is not None for name in {*hf_rece.__all__} - without_trl)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hf_rece, "rece_los")


def test_importing_does_not_load_the_trainer():
    code = "import sys, hf_rece; print('accelerate' in sys.modules, 'evaluate' in sys.modules, "
    code += "'hf_rece.training.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1:] == ["False", "False"]
