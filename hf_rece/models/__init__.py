"""SASRec, and a recommender over any Hugging Face decoder."""
