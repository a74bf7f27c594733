"""`python -m lowbit`, which is what torchrun starts."""

from lowbit.cli import main

if __name__ == "__main__":
    main()
