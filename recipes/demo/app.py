"""A Space that shows one recommender: push this folder to a Space, set MODEL_ID to a Hub id.

Here: MODEL_ID=my_model python recipes/demo/app.py
"""

import os

from hf_rece import RecommenderModel
from hf_rece.serving.demo import build_demo

demo = build_demo(RecommenderModel.from_pretrained(os.environ["MODEL_ID"]))

if __name__ == "__main__":
    demo.launch()
