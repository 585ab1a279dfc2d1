"""One run: set up, train, evaluate and export it. Also: load a finished run, and train several runs in one program."""
