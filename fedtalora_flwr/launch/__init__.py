"""Playing runs on this machine: in one process, in Flower's simulation, many from one file."""
