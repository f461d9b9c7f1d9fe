"""`python -m dualrefnet`, which is also what `accelerate launch -m dualrefnet` starts."""

from dualrefnet.cli import main

if __name__ == "__main__":
    main()
