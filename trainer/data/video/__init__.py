"""Video corpora: where the frames of a clip lie, how they are checked and decoded, what augmentation makes of them."""
