"""What every package may use: errors, files, processes, the console."""
