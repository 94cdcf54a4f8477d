"""The configuration: what a person writes is what runs, and a mistake costs one line and milliseconds."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcr_scale import config as tree
from dcr_scale import typed_yaml
from dcr_scale.config import Config, load_config
from dcr_scale.data.sources import USUAL_COLUMNS
from dcr_scale.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    def to_file(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


def error_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is written is what runs ------------------------------------------------------------------------------


def test_no_file_gives_the_documented_defaults():
    assert load_config(None, []) == Config()


def test_every_setting_is_documented():
    for schema in _schemas():
        for field in dataclasses.fields(schema):
            assert field.metadata["doc"], f"{schema.__name__}.{field.name}"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["refine=null"],
        ["run.name='3e-4'", "data.system_prompt='null'", "model.revision='0123'", "run.dir='Ünïcode: #x'"],
        ["data.contrast=[{path: a.csv, labels: {safe: seemingly_toxic, contrast: null}}]"],
    ],
)
def test_a_dumped_configuration_loads_as_the_same(write, overrides):
    # config.yaml in the run's folder must reproduce the run.
    config = load_config(None, overrides)
    assert load_config(write(typed_yaml.dump(config)), []) == config


@given(name=st.text() | st.from_regex(r"[-+]?[0-9.]{1,4}[eE_:][-+]?[0-9]{1,3}", fullmatch=True))
def test_no_text_changes_its_meaning_on_the_way_through_yaml(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(typed_yaml.dump(tree.RunConfig(name=name)), encoding="utf-8")
    assert typed_yaml.load(tree.RunConfig, path, []).name == name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_load(path):
    load_config(path, [])


def test_overrides_win_over_the_file_and_leave_the_rest(write):
    path = write("refine: {layer: 3, steps: 7}\nalign: {epochs: 2}\n")
    config = load_config(path, ["refine.layer=5", "align.optimizer.lr=3e-4"])
    assert (config.refine.layer, config.refine.steps, config.align.epochs) == (5, 7, 2.0)
    assert config.align.optimizer.lr == 3e-4


def test_the_last_override_of_a_key_wins():
    assert load_config(None, ["refine.layer=5", "refine.layer=6"]).refine.layer == 6
    assert load_config(None, ["refine.layer=auto"]).refine.layer == "auto"


def test_null_takes_a_stage_out_and_a_key_below_brings_it_back(write):
    path = write("refine: {layer: 3, steps: 7}\n")
    assert load_config(path, ["refine=null"]).refine is None
    # On a null branch there is nothing to keep: the file's steps are gone.
    assert load_config(path, ["refine=null", "refine.layer=20"]).refine == tree.RefineConfig(layer=20)


def test_an_override_replaces_a_whole_branch(write):
    path = write("refine: {layer: 3, steps: 7}\n")
    assert load_config(path, ["refine={layer: 9}"]).refine == tree.RefineConfig(layer=9)


def test_a_list_entry_is_reached_by_its_number(write):
    path = write("data: {contrast: [{path: a.csv}, {path: b.csv, label: toxic}]}\n")
    first, second = load_config(path, ["data.contrast.1.path=c.csv"]).data.contrast
    assert (first.path, second.path, second.label) == ("a.csv", "c.csv", "toxic")
    assert "data.contrast.2.path: '2' is not an index of the 2 entries" in error_of(path, "data.contrast.2.path=c.csv")


@pytest.mark.parametrize("file", [None, "run: {name: x}\n", "data: {contrast: null}\n", "data: {contrast: builtin}\n"])
def test_an_entry_of_a_list_that_the_file_does_not_give_says_to_give_the_list(write, file):
    path = write(file) if file else None
    assert error_of(path, "data.contrast.0.columns.pair=twin") == (
        "command line: data.contrast.0.columns.pair: the configuration file gives no list data.contrast to change an "
        "entry of; give it whole, as in 'data.contrast=[{columns: {pair: twin}}]'"
    )
    contrast = load_config(path, ["data.contrast=[{columns: {pair: twin}}]"]).data.contrast
    assert [source.columns.pair for source in contrast] == ["twin"]
    # A list that an earlier override gave is there.
    given = ["data.contrast=[{path: a.csv}]", "data.contrast.0.path=b.csv"]
    assert load_config(path, given).data.contrast[0].path == "b.csv"


def test_a_key_beneath_a_list_that_should_be_a_mapping_is_no_index(write):
    assert "refine.layer: 'layer' is not an index of the 1 entries" in error_of(
        write("refine: [1]\n"), "refine.layer=3"
    )


def test_yes_and_no_need_no_quotes_where_they_are_choices(write):
    path = write("look: {partitioned: no}\n")
    assert load_config(path, []).look.partitioned == "no"
    assert load_config(path, ["look.partitioned=yes"]).look.partitioned == "yes"
    assert "expected one of error, drop, found False" in error_of(path, "data.overlong=no")


@pytest.mark.parametrize("number", ["3e-4", "3E-4", "0.0003", "+3.e-4", ".3e-3"])
def test_every_way_to_write_a_number_is_one(write, number):
    assert load_config(write(f"refine: {{optimizer: {{lr: {number}}}}}"), []).refine.optimizer.lr == 3e-4
    assert load_config(None, [f"refine.optimizer.lr={number}"]).refine.optimizer.lr == 3e-4


def test_anchors_and_merged_keys_of_yaml_work(write):
    path = write("refine: {optimizer: &rate {lr: 1.0e-4, clip: 2.0}}\nalign: {optimizer: {<<: *rate, clip: 3.0}}\n")
    optimizer = load_config(path, []).align.optimizer
    assert (optimizer.lr, optimizer.clip) == (1e-4, 3.0)


# --- mistakes --------------------------------------------------------------------------------------------------


def test_an_unknown_key_names_its_nearest_match(write):
    expected = "unknown key refine.laier; did you mean refine.layer?"
    assert error_of(None, "refine.laier=3") == f"command line: {expected}"
    path = write("refine: {laier: 3}")
    assert error_of(path) == f"{path}: {expected}"
    glued = error_of(None, "data.contrast=[{path:rows.jsonl}]")
    assert glued.endswith("unknown key data.contrast.0.path:rows.jsonl; YAML wants a space after the colon of path:")
    assert error_of(None, "model.path:here=there").endswith("unknown key model.path:here; its value follows path=")
    assert error_of(None, "refin.layer=3") == "command line: unknown key refin; did you mean refine?"


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    message = error_of(None, "refine.loss.zzzz=3")
    assert message == "command line: unknown key refine.loss.zzzz; known here: name, margin, gamma, temperature"
    assert "refine.layer is a single value" in error_of(None, "refine.layer.x=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("refine.layer=deep", "refine.layer: expected a whole number, or auto, found 'deep' (text)"),
        ("refine.layer=1.5", "refine.layer: expected a whole number, or auto, found 1.5 (float)"),
        ("refine.layer=true", "refine.layer: expected a whole number, or auto, found True (bool)"),
        ("refine.layer=", "refine.layer: expected a whole number, or auto, found null"),
        ("refine.optimizer.lr=true", "refine.optimizer.lr: expected a number, found True (bool)"),
        ("refine.optimizer.lr=.nan", "refine.optimizer.lr: expected a finite number, found nan (float)"),
        ("model.gradient_checkpointing=1", "expected true or false, found 1 (int)"),
        ("run.name=7", "run.name: expected text, found 7 (int)"),
        ("refine.layer=0", "refine.layer: expected a whole number at least 1, or auto, found 0 (int)"),
        ("data.heldout=0", "data.heldout: expected a number above 0, found 0 (int)"),
        ("data.heldout=0.6", "data.heldout: expected a number at most 0.5, found 0.6 (float)"),
        ("look.layer=0", "look.layer: expected a whole number at least 1, found 0 (int)"),
        ("refine.pooling=max", "refine.pooling: expected one of last, mean, found 'max' (text)"),
        ("refine=3", "refine: expected a mapping of keys, found 3 (int)"),
        ("data.general=x.jsonl", "data.general: expected a list, found 'x.jsonl' (text)"),
        ("refine.optimizer.betas=[0.9]", "refine.optimizer.betas: expected a list of 2 values, found [0.9]"),
        ("refine.optimizer.betas=[0.9, x]", "refine.optimizer.betas.1: expected a number, found 'x' (text)"),
        ("data.contrast=[{label: rude}]", "data.contrast.0.label: expected one of seemingly_toxic, toxic"),
        ("refine.layer", "expected key=value, found 'refine.layer'"),
        ("run.name=[", "run.name: '[' is not valid YAML; quote it"),
    ],
)
def test_a_wrong_value_on_the_command_line(override, message):
    found = error_of(None, override)
    assert found.startswith("command line: ") and message in found


def test_a_wrong_value_is_blamed_on_who_set_it(write):
    path = write("refine: {layer: deep, steps: 0}")
    assert error_of(path).startswith(f"{path}: refine.layer: expected a whole number")
    assert error_of(path, "refine.layer=3").startswith(f"{path}: refine.steps: expected a whole number at least")
    assert error_of(path, "refine.layer=3", "refine.steps=x").startswith("command line: refine.steps: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refine:\n  layer: 3\n  layer: 4\n", ", line 3: not valid YAML: the key 'layer' is given twice"),
        ("refine: {layer: 3\n", ", line 2: not valid YAML: "),
        ("- refine\n", ": a configuration is a mapping of keys, found a list"),
        ("[a]: 3\n", ", line 1: not valid YAML: "),
        (b"run: {name: caf\xe9}\n", ": cannot be read as a UTF-8 text file"),
        ("run: {name: a\x00b}\n", ": not valid YAML: "),
        ("refine: null\nalign: null\n", ": refine and align are both null: there is nothing to do"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(write, text, message):
    path = write(text)
    assert error_of(path).startswith(f"{path}{message}")


def test_a_missing_file(tmp_path):
    assert error_of(tmp_path / "no.yaml").startswith(f"{tmp_path / 'no.yaml'}: no such configuration file")


# --- the command -----------------------------------------------------------------------------------------------


def launch(*arguments: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the launcher where importing anything heavy raises."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'transformers', 'deepspeed', 'numpy', 'datasets'):\n"
        "    sys.modules[name] = None\n"
    )
    return subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "dcr.py"), *arguments],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_typing_error_is_one_line_and_exit_code_2_before_torch_is_imported(tmp_path):
    demo = str(ROOT / "configs" / "demo.yaml")
    done = launch("--config", demo, "align.epochs=1", "--dry-run", "refine.laier=3", tmp_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown key refine.laier; did you mean refine.layer?\n"
    assert done.stdout == ""


def test_only_the_first_rank_of_a_node_reports_it(tmp_path):
    done = launch("--local_rank=1", "--config", "no.yaml", tmp_path=tmp_path, RANK="1", LOCAL_RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


# --- the tree itself -------------------------------------------------------------------------------------------


def _schemas() -> list[type]:
    return [
        member
        for member in vars(tree).values()
        if dataclasses.is_dataclass(member) and member.__module__ == tree.__name__
    ]


def test_every_setting_is_read_somewhere():
    """A setting nobody reads would be accepted and do nothing."""
    sources = [*(ROOT / "dcr_scale").rglob("*.py"), *(ROOT / "launchers").glob("*.py")]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [
        f"{schema.__name__}.{field.name}"
        for schema in _schemas()
        for field in dataclasses.fields(schema)
        # Columns are read by role, from the table of their usual names.
        if field.name not in (USUAL_COLUMNS if schema is tree.Columns else read)
    ]
    assert unread == []
