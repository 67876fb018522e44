"""Train a network: python train.py CONFIG [--overrides], for example configs/digits_resnet20.py."""

from collections.abc import Sequence

from resnet_jax.cli.arguments import parse_config, run_command


def main(args: Sequence[str]) -> int:
    config = parse_config(args)
    from resnet_jax.parallel import hosts  # here, so that --help and mistakes answer at once
    from resnet_jax.parallel.devices import configure
    from resnet_jax.training import train

    configure(config)
    metrics = train(config)
    if not hosts.is_first():
        return 0
    print(f"\ntest {metrics.result(0)} ({metrics.images:,} images)")
    print(f"see {config.run.workdir}/curves.png; evaluate again: python eval.py {config.run.workdir}")
    return 0


if __name__ == "__main__":
    run_command(main)
