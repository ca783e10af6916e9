"""Trained models as files of their own: vocabulary and normalisation inside, one clip in, log-probabilities out."""
