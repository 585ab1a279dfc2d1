"""One run: set up, train, evaluate, export; load a finished one; several in one program."""
