"""`python -m posttrain`, and what `torchrun -m posttrain` and `accelerate launch -m posttrain` start."""

from posttrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
