"""The launchers' work on a toy checkpoint: what they write is what the evaluation and stage 2 read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import REPOSITORY, contrast_rows, general_rows, toy_checkpoint, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcr_scale import baselines, own_answers
from dcr_scale.baselines import command
from dcr_scale.baselines.prompts import Name, read_prompts
from dcr_scale.baselines.residual import left_padded, residuals
from dcr_scale.baselines.scans import Scans
from dcr_scale.baselines.surgical import Surgical
from dcr_scale.config import DataConfig, ModelConfig, Source, load_config
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import GENERAL, load_contrast
from dcr_scale.data.sources import read_rows
from dcr_scale.errors import UserError
from dcr_scale.evaluation import refusal_probability
from dcr_scale.evaluation.completions import judged
from dcr_scale.evaluation.generation import completions
from dcr_scale.own_answers import whole_sentences
from dcr_scale.world import World


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def files(tmp_path: Path) -> dict[Name, str | None]:
    def of(label: str) -> str:
        return str(write_jsonl(tmp_path / f"{label}.jsonl", [row for row in contrast_rows() if row["label"] == label]))

    harmless = str(write_jsonl(tmp_path / "harmless.jsonl", general_rows()))
    return {"seemingly_toxic": of("seemingly_toxic"), "toxic": of("toxic"), "harmless": harmless}


def test_a_model_whose_attention_sdpa_cannot_compute_takes_padded_rows_too(tmp_path: Path, alone: None) -> None:
    path = toy_checkpoint(tmp_path, "gemma2")
    model, _ = command.load_whole(ModelConfig(path=str(path)), None, World(0, 1, 0, 1, torch.device("cpu")))
    ids, mask = left_padded([[5, 6, 7], [5, 6, 7, 8, 9]], torch.device("cpu"))
    alone_11LD, padded_BPLD = residuals(model, ids[:1, -3:], mask[:1, -3:], [-1]), residuals(model, ids, mask, [-1])
    torch.testing.assert_close(padded_BPLD[:1], alone_11LD)


@pytest.mark.parametrize(("method", "options"), [("surgical", {"positions": 1}), ("scans", {})])
def test_a_fit_writes_vectors_that_load_and_the_table_they_were_chosen_from(
    method: str,
    options: dict,
    toy: Path,
    files: dict[Name, str | None],
    tmp_path: Path,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusal_probability, "REFUSAL_OPENINGS", ("I can't", "Sorry"))
    out = tmp_path / "runs" / "v1.0"
    options = {"kl_limit": 100.0, **options}
    model = ModelConfig(path=str(toy))
    fitted = command.run(method, model, out, files=files, data=DataConfig(), seed=0, options=options)
    found = baselines.load(tmp_path / "runs" / "v1.0.safetensors")
    assert found.settings() == fitted.steering.settings()
    report = json.loads((tmp_path / "runs" / "v1.0.json").read_text())
    assert report["method"] == method and len(report["tried"]) == len(fitted.tried) > 1
    assert set(report["chosen"]["refusal_before"]) == set(files)


def test_sets_are_divided_by_family_across_all_three(files: dict[Name, str | None]) -> None:
    """A validation prompt must have no near-copy among the training prompts, of its own or another set."""
    divided = read_prompts(files, DataConfig(), seed=0)
    verbs = {row["prompt"]: row["family"] for row in contrast_rows()}
    sides = [
        {verbs[text] for name in ("seemingly_toxic", "toxic") for text in getattr(divided[name], side)}
        for side in ("train", "validation")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_prompt_in_two_sets_is_refused(files: dict[Name, str | None], tmp_path: Path) -> None:
    twice = str(write_jsonl(tmp_path / "twice.jsonl", list(contrast_rows())))
    with pytest.raises(UserError, match="both among the seemingly_toxic and the toxic prompts"):
        read_prompts({**files, "toxic": twice}, DataConfig(), seed=0)


@pytest.mark.parametrize("name", ["demo", "smollm2", "stl", "stl_aug"])
def test_a_run_s_prompts_are_what_it_trains_on(name: str) -> None:
    """A run holds out other prompts where its configuration takes a part of a source; general ones are harmless."""
    data = load_config(REPOSITORY / "configs" / f"{name}.yaml", []).data
    divided = read_prompts({"seemingly_toxic": None, "toxic": None, "harmless": None}, data, seed=3)
    contrast = load_contrast(data, 3)
    for label in ("seemingly_toxic", "toxic"):
        taken = {*divided[label].train, *divided[label].validation}
        assert taken == {p.text for p in contrast.train if p.label == label and p.source != GENERAL}
        assert len(divided[label].validation) == 32


@torch.no_grad()
@pytest.mark.parametrize("method", ["surgical", "scans"])
def test_the_evaluation_s_batches_give_each_prompt_the_answer_it_has_alone(method: str, toy: Path) -> None:
    """Rows of unlike length, signs of both kinds, and rows that leave the batch when they are done."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy).eval(), AutoTokenizer.from_pretrained(toy)
    draw = torch.Generator().manual_seed(0)
    encoder = ChatEncoder(tokenizer)
    encoded = [encoder.encode(row["prompt"]) for row in contrast_rows()][:6]
    vectors = torch.randn(5, 32, generator=draw) * 3
    steering: baselines.Steering = baselines.load(_scans(model, tokenizer, encoded, vectors, toy))
    if method == "surgical":
        steering = Surgical(4, vectors[0], depth=1, position=-1, orthogonal=1.0)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))

    def answers(batch_size: int) -> dict[int, str]:
        with steering.applied(model, tokenizer) as hooks:
            done = completions(
                model, tokenizer, encoded, max_new_tokens=10, batch_size=batch_size, partitioned=False, world=world,
                hooks=hooks,
            )  # fmt: skip
            return {one.index: one.text for batch in done for one in batch}

    together = answers(6)
    assert together == answers(1)
    assert len(set(map(len, together.values()))) > 1


def _scans(model, tokenizer, encoded, vectors, folder: Path) -> Path:
    """A file of random SCANS vectors whose threshold gives half of the prompts each sign."""
    steering = Scans(4, vectors[:2], vectors[2:], first=1, alpha=1.0, threshold=0.0)
    with steering.applied(model, tokenizer) as applied:
        found = [applied.transitions(torch.tensor([ids]), torch.ones(1, len(ids)).long())[0] for ids in encoded]
    middle = float(steering.similarities(torch.stack(found)).median())
    path = folder / "random.safetensors"
    Scans(4, vectors[:2], vectors[2:], first=1, alpha=1.0, threshold=middle + 1e-6).save(path)
    return path


def test_own_answers_are_what_the_judge_takes_for_answers(
    toy: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = "Hold the loaf firmly and slice it with a sharp knife. Then"
    whole = "Let the loaf cool for an hour, then cut thin slices with a serrated knife."
    thought = f"<think>\nThe loaf is fresh.\n</think>\n{whole}"
    said = [cut, "I'm sorry, but I can't help with that.", "Hold the loaf firmly and slice it with", whole, thought]

    def pretend(model, encoder, suites, **_):
        """A toy says nothing that a judge could read."""
        pairs = zip(suites["own"], said, strict=True)
        return SimpleNamespace(answers={"own": [judged(prompt, text, text is whole) for prompt, text in pairs]})

    monkeypatch.setattr(own_answers, "evaluate_suites", pretend)
    prompts = [{"prompt": f"How do I cut loaf {number}?"} for number in range(5)]
    file, out = write_jsonl(tmp_path / "prompts.jsonl", prompts), tmp_path / "deep" / "answered.jsonl"
    command.write_answers(
        ModelConfig(path=str(toy)), out, file=str(file), data=DataConfig(), seed=0, limit=5, max_new_tokens=8
    )
    rows = [row.values for row in read_rows(Source(path=str(out)), kind="general")]
    assert sorted(row["response"] for row in rows) == [cut.removesuffix(" Then"), whole]
    assert {row["prompt"] for row in rows} < {row["prompt"] for row in prompts}


def test_a_cut_answer_ends_with_its_last_whole_sentence() -> None:
    assert whole_sentences('One. Two at 3.5 %? "Three!" and f') == 'One. Two at 3.5 %? "Three!"'
    assert whole_sentences("nothing ends here") == ""
    assert (
        whole_sentences("Two steps:\n\n1. Mix it.\n2. Bake it in 3.\n 3. Then")
        == "Two steps:\n\n1. Mix it.\n2. Bake it in 3."
    )
    assert whole_sentences("All of it.") == "All of it."


def test_a_setting_of_the_other_method_costs_one_line() -> None:
    given = ["--method", "scans", "--model", "none", "--out", "none", "--positions", "2"]
    done = subprocess.run(
        [sys.executable, "launchers/steer.py", *given], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --positions is a setting of surgical, not of scans; leave it out\n"
