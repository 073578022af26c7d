"""`dpo check` and `dpo explain`: what is wrong with preference data, before GPU time is spent."""
