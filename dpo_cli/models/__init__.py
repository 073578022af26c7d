"""Models: loading, adapters, attention, forward layout, response log-probs, fingerprint."""
