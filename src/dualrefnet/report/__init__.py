"""One page about a run or a suite, for people who have only a browser."""
