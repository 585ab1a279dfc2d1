"""Methods side by side: a grid of runs from one file, resumed where it stopped, and one report of them."""
