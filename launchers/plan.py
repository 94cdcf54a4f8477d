"""What a run takes: ``python launchers/plan.py --config configs/llama3_70b.yaml --gpus 8 --gpu-memory 80``.

Reads no weights and needs no network. Exit codes: 0 planned, 1 with --require-fit where a stage does not fit, 2
something to put right (one line says what).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dcr_scale.command_line import exit_code, leave, written
from dcr_scale.config import load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file; configs/ has one per kind of run")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, eight to a node (default: 8)")
    parser.add_argument("--gpu-memory", type=float, help="GiB of each (default: the device's own)")
    parser.add_argument("--device", choices=("a100", "h100", "h200"), default="h100", help="(default: h100)")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="config.json of the model to plan for")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=20,
        help="assumed tokens of a prompt, where no tokenizer is at hand (default: %(default)s)",
    )
    parser.add_argument(
        "--example-tokens", type=int, default=220, help="the same of an example with its answer (default: %(default)s)"
    )
    parser.add_argument(
        "--prefix-tokens",
        type=int,
        default=30,
        help="the same of what the chat template puts before (default: %(default)s)",
    )
    parser.add_argument("--require-fit", action="store_true", help="exit with 1 where a stage does not fit")
    parser.add_argument("--sweep", type=Path, metavar="PNG", help="draw the time of a step on 8 to 512 GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    return parser.parse_intermixed_args()


def plan() -> bool:
    """Print the plan, and whatever else was asked for; returns whether every stage fits."""
    arguments = parse_arguments()
    # Before anything heavy is imported: a typing error should cost no more than this.
    config = load_config(arguments.config, arguments.overrides)
    from dcr_scale.planning.hardware import DEVICES, GIB
    from dcr_scale.planning.stages import Cluster, check_cluster, make_planner
    from dcr_scale.planning.table import as_tree, table
    from dcr_scale.planning.workload import Assumed

    device = DEVICES[arguments.device]
    memory = device.memory if arguments.gpu_memory is None else arguments.gpu_memory * GIB
    assumed = Assumed(
        prefix=arguments.prefix_tokens, prompt=arguments.prompt_tokens, example=arguments.example_tokens
    )  # fmt: skip
    check_cluster(arguments.gpus, memory, assumed)
    planner = make_planner(config, assumed, arguments.model_config)
    plans = planner.plan(Cluster(arguments.gpus, memory, device))
    print(table(plans, planner.notes))
    if arguments.json is not None:
        with written(arguments.json):
            arguments.json.write_text(json.dumps(as_tree(plans, planner.notes), indent=2) + "\n", encoding="utf-8")
    if arguments.sweep is not None:
        from dcr_scale.planning.sweep import draw_sweep, sweep, sweep_table

        swept = sweep(planner, device, memory)
        print("\n" + sweep_table(swept))
        with written(arguments.sweep):
            draw_sweep(swept, arguments.sweep, config.run.name)
    return not arguments.require_fit or all(stage.fits for stage in plans)


def main() -> int:
    fits = True

    def work() -> None:
        nonlocal fits
        fits = plan()

    return exit_code(work) or int(not fits)


if __name__ == "__main__":
    leave(main())
