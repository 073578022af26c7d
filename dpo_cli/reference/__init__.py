"""Log-probs of the reference model: computed once, kept on disk, checked when read."""
