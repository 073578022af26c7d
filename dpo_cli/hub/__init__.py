"""What leaves a run: exported models, merged adapters, model cards, uploads."""
