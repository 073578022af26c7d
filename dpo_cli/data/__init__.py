"""Preference data: sources, formats, chat templates, tokenization, pairs of token ids, and their batches."""
