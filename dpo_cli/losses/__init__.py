"""The preference losses as pure functions, and the objective that a run minimises."""
