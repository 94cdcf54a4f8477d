"""Which cells the study consists of. A cell is one model trained and judged: a method, a share of refusals, a seed."""

from __future__ import annotations

from dataclasses import dataclass

from dcr_scale.study.methods import BASELINES, CLAIMED, METHODS, WITHOUT_STAGE_1

# From models that refuse a few toxic prompts to models that refuse nearly all.
SHARES = (0.15, 0.25, 0.5)
SEEDS = (0, 1, 2)
# Of the confirmation, which repeats what was found on prompts that no method was chosen by.
_NEW_SEEDS = (3, 4, 5)
# All seeds from the first; the rivals have their other seeds from the second grid, and the rest show by one seed which
# part of the method does what.
_REPEATED = ("stl", "dcr")
_ONCE = ("stl_aug", "surgical", "scans", "dcr_paper", "dcr_matched", "dcr_circle")
_SECOND = (
    "dcr_above",
    "stl_above",
    "dcr_long",
    "dcr_long_above",
    "dcr_without_general",
    "dcr_retained",
    "dcr_layer_8",
    "dcr_layer_24",
    "dcr_answered",
    "dcr_answered_more",
    "dcr_answered_twice",
    "stl_aug_more",
    "stl_more",
    "dcr_toxic_third",
    "dcr_rehearsed_on_top",
    "dcr_retained_layer_24",
)


@dataclass(frozen=True, order=True)
class Cell:
    """``share``: of refusals among stage 2's examples."""

    seed: int
    method: str
    share: float

    def __post_init__(self) -> None:
        assert self.method in METHODS, self.method

    @property
    def name(self) -> str:
        """``dcr_share50_seed0``: also its record's file name."""
        return f"{self.method}_share{round(100 * self.share)}_seed{self.seed}"


def probed(cell: Cell) -> bool:
    """Whether kernel similarity is measured through this cell's stage 2, which then takes four times as long: once for
    each seed of what is claimed, but for the last of it, which differs in stage 1."""
    return cell.method in ("stl", *CLAIMED[:-1]) and cell.share == SHARES[-1] and cell.seed in SEEDS


def measured(cell: Cell) -> bool:
    """Whether kernel similarity of many held-out pairs is measured before, between and after this cell's stages: of all
    models of what is claimed, of plain safety tuning's, and of the method that is to keep it low."""
    return cell.method in ("stl", *CLAIMED, "dcr_rehearsed_on_top")


def first_grid() -> list[Cell]:
    """36 cells, those that say most first: should the study be cut off, what is there can be compared."""
    cells = [Cell(seed, method, share) for seed in SEEDS[:1] for method in _REPEATED for share in SHARES]
    cells += [Cell(SEEDS[0], method, share) for method in _ONCE for share in SHARES]
    cells += [Cell(seed, method, share) for seed in SEEDS[1:] for method in _REPEATED for share in SHARES]
    return cells


def second_grid() -> list[Cell]:
    """What the first grid suggests to ask next: the best recipes, their stage 2 alone and the rivals by all seeds, and
    which parts of DCR matter."""
    repeated = (*CLAIMED[:0:-1], WITHOUT_STAGE_1)
    cells = [Cell(seed, method, share) for method in repeated for seed in SEEDS for share in SHARES]
    cells += [Cell(seed, method, share) for seed in SEEDS[1:] for method in BASELINES[1:] for share in SHARES]
    return cells + [Cell(SEEDS[0], method, share) for method in _SECOND for share in SHARES]


def confirmation_grid() -> list[Cell]:
    """What the other grids found best, its stage 2 alone, and STL, by seeds of their own."""
    methods = ("stl", CLAIMED[-1], WITHOUT_STAGE_1)
    return [Cell(seed, method, share) for seed in _NEW_SEEDS for method in methods for share in SHARES]


def quick_grid() -> list[Cell]:
    """STL against DCR, one seed, two shares; not those in whose stage 2 the probe measures."""
    return [Cell(SEEDS[0], method, share) for method in _REPEATED for share in SHARES[:2]]
