"""The front doors: the `dpo` command, and the same as functions of Python."""
