"""python -m benchmarks.gpu"""

if __name__ == "__main__":  # every peer's process imports this module
    from benchmarks.gpu.command import main
    from resnet_jax.cli.arguments import run_command

    run_command(main)
