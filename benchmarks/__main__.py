"""python -m benchmarks"""

if __name__ == "__main__":  # every peer's process imports this module, which must not take their memory
    from benchmarks.driver import main
    from resnet_jax.cli.arguments import run_command

    run_command(main)
