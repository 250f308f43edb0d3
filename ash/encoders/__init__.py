"""Text to unit vectors: a sentence-transformers process behind the Encoder port, and its shipped fake."""
