"""How time and memory grow with the size of the work, of the adapter and of the data."""
