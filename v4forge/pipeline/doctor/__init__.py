"""What can go wrong on this machine: checks of GPUs, containers, disk, system and network."""
