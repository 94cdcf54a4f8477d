"""Hashes: the same whoever computes them, and whatever changes a byte is found and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import RankPool
from toy_checkpoints import open_toy, partition, save_toy, world_of
from transformers import AutoConfig, AutoModelForCausalLM

from dcr_scale.errors import UserError
from dcr_scale.models import verify
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.manifest import ALONE, MANIFEST_FILE, Digests, Manifest, chunk_bytes, hash_file
from dcr_scale.models.verified_loading import load_verified, verify_weights
from dcr_scale.models.weights import own_part


def reference_hash(data: bytes) -> str:
    """The manifest's method as its description says it."""
    length = chunk_bytes(len(data))
    chunks = [data[i : i + length] for i in range(0, len(data), length)]
    return xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_64_digest(chunk) for chunk in chunks))


@given(st.integers(0, 40_000), st.lists(st.integers(0, 40_000), max_size=6), st.randoms())
def test_a_tensor_that_passes_in_any_parts_and_order_has_one_hash(nbytes: int, cuts: list[int], random) -> None:
    data = memoryview(bytes(i * 31 % 251 for i in range(nbytes)))
    edges = sorted({0, nbytes, *(cut for cut in cuts if cut < nbytes)})
    parts = list(zip(edges, edges[1:], strict=False))
    random.shuffle(parts)
    digests = Digests({"t": nbytes})
    digests.add("t", 0, data[:0])
    for begin, end in parts:
        digests.add("t", begin, data[begin:end])
    assert digests.complete(ALONE, lambda _, start, stop: data[start:stop]) == {"t": reference_hash(bytes(data))}


def test_only_chunks_that_a_border_cuts_are_read_again() -> None:
    data = memoryview(os.urandom(50_000))
    digests, again = Digests({"t": len(data)}), []
    for begin, end in ((0, 20_000), (20_000, 50_000)):
        digests.add("t", begin, data[begin:end])
    digests.complete(ALONE, lambda _, start, stop: (again.append((start, stop)), data[start:stop])[1])
    assert again == [(16_384, 20_480)]


def test_chunks_grow_with_the_tensor_up_to_a_limit() -> None:
    assert chunk_bytes(0) == chunk_bytes(8 * 2**20) == 4096
    assert chunk_bytes(8 * 2**20 + 1) == 8192
    assert chunk_bytes(2 * 128256 * 8192) == 256 * 1024


def exported(folder: Path, architecture: str = "llama") -> Path:
    """A checkpoint with a manifest, of shards, whose first layer has changed."""
    save_toy(folder / "source", architecture, sharded=True, dtype=torch.bfloat16)
    checkpoint, tensor_map = open_toy(folder / "source")
    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    changed = {name: p for name, p in model.named_parameters() if name.startswith("model.layers.0.")}
    with torch.no_grad():
        for parameter in changed.values():
            parameter.neg_()
    export_checkpoint(folder / "out", checkpoint, tensor_map, changed, world=world_of())
    return folder / "out"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_manifest_holds_every_file_and_tensor(tmp_path: Path, architecture: str) -> None:
    folder = exported(tmp_path, architecture)
    manifest, checkpoint = Manifest.read(folder), Checkpoint.open(folder)
    assert manifest is not None
    assert manifest.sizes == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST_FILE}
    assert manifest.tensors.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        assert manifest.tensors[name] == hash_file(folder / info.file, info.start, info.nbytes)
        assert manifest.tensors[name] == reference_hash(bytes(checkpoint.read_bytes(name, 0, info.nbytes)))
    assert not list(verify.damage(folder))


def test_a_second_export_takes_over_the_hashes_of_what_stays(tmp_path: Path) -> None:
    """Its unchanged tensors are copied without being read; the manifest is what reading them would have given."""
    folder = exported(tmp_path)
    checkpoint, tensor_map = open_toy(folder)
    norm = torch.nn.Parameter(torch.full((24,), 3.0))
    export_checkpoint(tmp_path / "next", checkpoint, tensor_map, {"model.norm.weight": norm}, world=world_of())
    before, after = Manifest.read(folder), Manifest.read(tmp_path / "next")
    assert before is not None and after is not None
    assert [name for name in before.tensors if before.tensors[name] != after.tensors[name]] == ["model.norm.weight"]
    assert not list(verify.damage(tmp_path / "next"))


def test_the_command_names_each_damage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = exported(tmp_path)
    assert verify.main([str(folder)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out

    checkpoint = Checkpoint.open(folder)
    tensors = list(checkpoint.tensors)
    info = checkpoint.tensors[tensors[0]]
    flip(folder / info.file, info.start + info.nbytes - 1)
    last = checkpoint.tensors[tensors[-1]].file
    assert last != info.file
    (folder / last).write_bytes((folder / last).read_bytes()[:-1])
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("llama", "Llama"))
    (folder / "generation_config.json").unlink()
    assert verify.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{info.file}: tensor {tensors[0]} differs" in lines
    assert "config.json: differs" in lines
    assert "generation_config.json: missing" in lines
    assert any(line.startswith(f"{last}: ") and line.endswith(" were written") for line in lines)
    assert len(lines) == 4


def test_damage_in_a_header_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = exported(tmp_path)
    file = Checkpoint.open(folder).files[0]
    # Still JSON, and the same tensors: only the hash knows.
    path = folder / file
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tf"'))
    assert verify.main([str(folder)]) == 1
    assert capsys.readouterr().out == f"{file}: its header differs\n"


def test_without_a_manifest_there_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_toy(tmp_path, "llama")
    assert verify.main([str(tmp_path)]) == verify.main([str(tmp_path / "nowhere")]) == 2
    errors = capsys.readouterr().err
    assert "holds no manifest.json of dcr-scale" in errors and "nowhere: no such folder" in errors
    # Another program's manifest says nothing to this one.
    (tmp_path / MANIFEST_FILE).write_text('{"name": "app"}')
    assert Manifest.read(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format=2), r"is of format 2 .* update it"),
        (lambda tree: tree.pop("tensors"), r"is damaged \(KeyError\('tensors'\)\)"),
        (None, "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_so(tmp_path: Path, change, message: str) -> None:
    folder = exported(tmp_path)
    path = folder / MANIFEST_FILE
    tree = json.loads(path.read_text())
    if change is not None:
        change(tree)
    path.write_text(json.dumps(tree) if change is not None else "{")
    with pytest.raises(UserError, match=message):
        Manifest.read(folder)


def load_on_ranks(folder: str, parts: bool) -> str | None:
    """On each rank of the pool: the message of a load's UserError."""
    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if parts:
        for parameter in model.parameters():
            partition(parameter, world.rank, world.size)
    try:
        load_verified(model, *open_toy(Path(folder)), world)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("parts", [True, False], ids=["partitioned", "whole"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_flipped_bit_is_found_by_every_rank_as_it_loads(
    tmp_path: Path, ranks: RankPool, architecture: str, parts: bool
) -> None:
    folder = exported(tmp_path, architecture)
    assert ranks.run(load_on_ranks, str(folder), parts, world_size=3) == [None] * 3
    checkpoint = Checkpoint.open(folder)
    for name in [list(checkpoint.tensors)[3], "model.norm.weight"]:
        info = checkpoint.tensors[name]
        for position in (info.start, info.start + info.nbytes // 2, info.start + info.nbytes - 1):
            flip(folder / info.file, position)
            messages = ranks.run(load_on_ranks, str(folder), parts, world_size=3)
            assert messages[0] == messages[1] == messages[2]
            assert f"{info.file}: {name} not as manifest.json says" in str(messages[0])
            flip(folder / info.file, position)


def test_a_file_cut_short_on_the_way_is_an_error_on_every_rank(tmp_path: Path, ranks: RankPool) -> None:
    folder = exported(tmp_path)
    messages = ranks.run(load_from_shortened, str(folder), world_size=2)
    assert messages[0] == messages[1]
    assert "the file ends at byte" in messages[0]


def load_from_shortened(folder: str) -> str:
    """On each rank: a file of the opened checkpoint becomes shorter; only the rank with its end can see that."""
    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    checkpoint, tensor_map = open_toy(Path(folder))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        partition(parameter, world.rank, world.size)
    world.barrier()
    path = Path(folder) / checkpoint.files[-1]
    if world.first:
        os.truncate(path, path.stat().st_size - 2)
    world.barrier()
    with pytest.raises(UserError) as caught:
        load_verified(model, checkpoint, tensor_map, world)
    return str(caught.value)


def test_values_in_memory_that_are_not_the_files_are_found(tmp_path: Path) -> None:
    save_toy(tmp_path, "llama", dtype=torch.bfloat16)
    checkpoint, tensor_map = open_toy(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    for parameter in model.parameters():
        partition(parameter, 1, 3)
    load_verified(model, checkpoint, tensor_map, world_of())
    every = len(list(model.parameters()))
    # As if this rank had been given its neighbour's part of one parameter.
    part = own_part(model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    part.values.copy_(part.values.roll(1))
    with pytest.raises(UserError, match=r"holds other values of model\.layers\.1\.mlp\.up_proj\.weight \(elements 3"):
        verify_weights(model, checkpoint, tensor_map, world_of(), samples=every)
