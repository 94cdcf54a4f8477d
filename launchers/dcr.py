"""Refine a checkpoint: ``deepspeed launchers/dcr.py --config configs/demo.yaml [key=value ...]``.

Runs under deepspeed, torchrun or srun, or alone. Run again, it goes on where it was interrupted. Exit codes: 0 done,
2 something to put right (one line says what), 75 told to stop and saved, to be run again, 1 anything else.
"""

from __future__ import annotations

import argparse
import os

from dcr_scale import typed_yaml
from dcr_scale.command_line import exit_code, first_rank, leave
from dcr_scale.config import Config, load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file; configs/ has one per kind of run")
    parser.add_argument("--dry-run", action="store_true", help="print the settings, what would run, and what it takes")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry-run: plan for N (default: the launcher's)")
    parser.add_argument("--fresh", action="store_true", help="begin anew: remove what the run's folder holds of it")
    parser.add_argument("--accept-changes", action="store_true", help="go on though settings or data have changed")
    # The deepspeed launcher puts it in front; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    return parser.parse_intermixed_args()


def refine() -> None:
    arguments = parse_arguments()
    # Before anything heavy is imported: a typing error should cost no more than this.
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        if first_rank():
            ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS")
            dry_run(config, arguments.gpus or int(ranks or 1))
        return
    from dcr_scale.pipeline import run

    run(config, fresh=arguments.fresh, accept_changes=arguments.accept_changes)


def dry_run(config: Config, gpus: int) -> None:
    """Settings, data, and the plan of ``launchers/plan.py``, where the model's shape is known without its weights."""
    print(typed_yaml.dump(config))
    from dcr_scale.planning import describe_plan
    from dcr_scale.planning.finding import NoShapes
    from dcr_scale.run_data import describe

    print(describe(config), end="\n\n")
    try:
        print(describe_plan(config, gpus))
    except NoShapes as error:
        print(f"no plan: {error}")


def main() -> int:
    return exit_code(refine)


if __name__ == "__main__":
    leave(main())
