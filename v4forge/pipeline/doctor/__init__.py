"""The doctor: what can go wrong on a machine, one module of checks for each of its parts."""
