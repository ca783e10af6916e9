"""Checkpoints: written aside, checksummed, published by rename, checked before use; no pickle anywhere."""
