"""python -m resnet_jax COMMAND ..."""

from resnet_jax.cli.arguments import run_command
from resnet_jax.cli.commands import main

if __name__ == "__main__":
    run_command(main)
