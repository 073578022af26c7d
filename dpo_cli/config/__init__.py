"""Every option once, with its type, default, help and check; flags and YAML files make options of it."""
