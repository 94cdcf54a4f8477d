"""The README.md of an exported checkpoint: what was done to it, with what, and what it changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcr_scale import typed_yaml
from dcr_scale.config import Config
from dcr_scale.evaluation.look import Look, table

_STAGES = {
    "refined": "stage 1 of DCR (contrastive refinement): its activations tell toxic from seemingly toxic prompts. "
    "It has had no safety alignment yet.",
    "aligned": "safety alignment by supervised fine-tuning",
    "adapter": "safety alignment by supervised fine-tuning, as a LoRA adapter of the model it was trained on",
}


def model_card(config: Config, stage: str, source: Path, facts: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    """Markdown with the run's facts.

    Args:
        stage: ``refined``, ``aligned`` or ``adapter``.
        source: the checkpoint the run started from.
        facts: what each stage did so far, as in ``summary.json``.
        looks: what was seen before this checkpoint was written.
    """
    after = ""
    if stage != "refined":
        baseline = "STL-aug" if config.data.answered else "STL"
        rehearsed = config.align is not None and config.align.rehearsal.weight > 0
        if config.refine is not None:
            after = " after contrastive refinement (DCR)"
        elif rehearsed:
            after = ", without refinement before it"
        else:
            after = f", without refinement ({baseline})"
        after += ", with the contrastive loss kept up" if rehearsed else ""
    library = "peft" if stage == "adapter" else "transformers"
    tree = typed_yaml.to_tree(config)
    settings = {name: tree[name] for name in ("data", "refine", "align") if tree[name] is not None}
    # Asked in another way it is another model than the one that was trained and looked at.
    settings |= {"model": {"template": config.model.template}} if config.model.template else {}
    sections = [
        f"---\nbase_model: {json.dumps(source.name)}\nlibrary_name: {library}\npipeline_tag: text-generation\n"
        "tags:\n- dcr\n- safety\n- over-refusal\n---",
        f"# {config.run.name}: {source.name}, {stage}",
        f"This checkpoint is `{source.name}` after {_STAGES[stage]}{after}. Made by dcr-scale; the method is "
        "Discernment via Contrastive Refinement (arXiv 2603.03323).",
        "The licence of the source checkpoint applies. Its own card lies in the source's folder.",
        f"## What was done\n\n```json\n{json.dumps(facts, indent=2)}\n```",
    ]
    if looks:
        sections.append(f"## What was seen up to here\n\n```\n{table(looks)}\n```")
    sections.append(f"## Settings\n\n```yaml\n{typed_yaml.dump(settings)}```")
    return "\n\n".join(sections) + "\n"
