"""Packed corpora: shards of records, their index, and where they lie."""
