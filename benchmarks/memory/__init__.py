"""Time and memory that trainings and evaluations take."""
