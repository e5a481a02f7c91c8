"""What the judge calls: embeddings of the queries and of the database, compared by cosine similarity."""
from __future__ import annotations

import numpy as np
import pandas as pd
from model import load_model

import retrieval.predict as method

method.load_encoder = load_model  # from weights.pth


def encode_queries(df: pd.DataFrame) -> np.ndarray:
    """(n_queries, d) for the columns `query_image` (paths) and `query_text`."""
    return method.encode_queries(df)


def encode_database(df: pd.DataFrame) -> np.ndarray:
    """(n_images, d) for the column `target_image` (paths)."""
    return method.encode_database(df)
