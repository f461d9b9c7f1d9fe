"""Whether a data set and its split can be trusted: leaks, copies, gaps and columns that give the answer away."""
