"""Greedy answers to many prompts, each rank generating its share.

Plain argmax: no sampling, no penalties, whatever the checkpoint's generation config says beside its end tokens.

What makes it fast, most of all on a CPU: large batches of like length, longest first; a beginning that all prompts
share (the chat template's header) run once; keys and values written in place; logits of each row's last token alone;
and rows that have ended leave the batch. None of it changes an answer but by the rounding of sums in another order.

Shape suffixes: N rows of the batch, T tokens of its longest prompt after the shared beginning, P tokens of that
beginning, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from dcr_scale.evaluation import decoding_cache
from dcr_scale.world import World

# Copying the cache of those that stay pays once so large a share has left.
_LEAVE_TOGETHER = 1 / 8


@dataclass(frozen=True)
class Completion:
    """The answer to prompt number ``index``: its text, how many tokens that took (the end token not counted), and
    whether the model ended it (``finished``) or the limit did."""

    index: int
    text: str
    tokens: int
    finished: bool


class RowHooks(Protocol):
    """Hooks that treat each row of a batch in its own way."""

    def keep(self, rows: Tensor) -> None:
        """From now on, row i is what was row ``rows[i]``."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    partitioned: bool,
    world: World,
) -> list[Completion]:
    """All ranks' :func:`completions`, on every rank and in the prompts' order."""
    own = completions(
        model,
        tokenizer,
        encoded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        partitioned=partitioned,
        world=world,
    )
    shares = world.gather([done for batch in own for done in batch])
    merged = {done.index: done for share in shares for done in share}
    return [merged[i] for i in range(len(encoded))]


def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    partitioned: bool,
    world: World,
    hooks: RowHooks | None = None,
) -> Iterator[list[Completion]]:
    """This rank's share of the greedy completions of N encoded prompts, batch by batch as they are done.

    Every rank must exhaust the iterator: where the model is partitioned, each pass is a collective.

    Args:
        model: a transformers causal language model, the same on every rank or spread over them (``partitioned``).
        encoded: token ids, the same on all ranks, none empty.
        batch_size: prompts generated at once on one rank, at most; prompts of like length share a batch.
        hooks: what hooks on the model remember of each row since its prompt's pass, if there are any. All prompts
            then run whole.
    """
    greedy = _Greedy(model, tokenizer, encoded, max_new_tokens, partitioned and world.size > 1, world, hooks)
    # Every rank runs equally many batches, of nearly equal size: ranks finish together, and under ZeRO-3 they must.
    plan = batches([len(ids) for ids in encoded], batch_size, world.size)
    for at in range(0, len(plan), world.size):
        group = plan[at : at + world.size]
        if world.rank < len(group):
            yield greedy.answer(group[world.rank])
        elif greedy.together:
            # Fewer prompts than ranks: this one only takes part in the others' passes.
            greedy.answer(group[-1])


def batches(lengths: Sequence[int], batch_size: int, ranks: int) -> list[list[int]]:
    """Indices of all prompts in batches of like length and nearly equal size, longest first.

    Batches of ``batch_size`` at most, and their number a multiple of ``ranks`` where there are as many prompts.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = min(len(order), -(-len(order) // (batch_size * ranks)) * ranks)
    bounds = [len(order) * number // count for number in range(count + 1)] if count else [0]
    return [order[low:high] for low, high in zip(bounds, bounds[1:], strict=False)]


class _Greedy:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoded: Sequence[Sequence[int]],
        max_new_tokens: int,
        together: bool,
        world: World,
        hooks: RowHooks | None,
    ):
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.max_new_tokens, self.together, self.world, self.hooks = max_new_tokens, together, world, hooks
        self.pad = _pad_token(tokenizer)
        self.ends = torch.tensor(_end_tokens(model, tokenizer), device=world.device)
        self.shared = self._shared() if hooks is None else 0
        self.beginning: Cache | None = None

    @torch.no_grad()
    def answer(self, batch: list[int]) -> list[Completion]:
        with dense_attention(self.model):
            tokens = self._decode([list(self.encoded[i]) for i in batch])
        ends = set(self.ends.tolist())
        done = []
        for i, row in zip(batch, tokens, strict=True):
            length = next((at for at, token in enumerate(row) if token in ends), len(row))
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            done.append(Completion(i, text, length, length < len(row)))
        return done

    def _decode(self, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt, its end token included where it has one."""
        ids_NT, mask_NS, positions_NT = self._padded(prompts)
        rows = torch.arange(len(prompts), device=self.world.device)
        answers = torch.full((len(prompts), self.max_new_tokens), self.pad, device=self.world.device)
        lengths = torch.zeros_like(rows)
        cache = self._cache(len(prompts), ids_NT.shape[1])
        live = torch.ones_like(rows, dtype=torch.bool)
        for step in range(self.max_new_tokens):
            logits_NV = self.model(
                input_ids=ids_NT,
                attention_mask=mask_NS,
                position_ids=positions_NT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = logits_NV.argmax(dim=-1)
            answers[rows[live], step] = chosen[live]
            lengths[rows[live]] = step + 1
            live = live & ~torch.isin(chosen, self.ends)
            if self._all_done(live):
                break
            ids_NT, positions_NT = chosen[:, None], positions_NT[:, -1:] + 1
            mask_NS = torch.cat([mask_NS, mask_NS.new_ones(len(mask_NS), 1)], dim=1)
            if self._can_leave(live):
                stay = live.nonzero()[:, 0]
                decoding_cache.keep(cache, stay)
                if self.hooks is not None:
                    self.hooks.keep(stay)
                ids_NT, positions_NT, mask_NS, rows, live = (
                    x[stay] for x in (ids_NT, positions_NT, mask_NS, rows, live)
                )
        return [row[:length] for row, length in zip(answers.tolist(), lengths.tolist(), strict=True)]

    def _all_done(self, live: Tensor) -> bool:
        left = bool(live.any())
        if self.together:
            (anyone,) = self.world.max(float(left))
            return not anyone
        return not left

    def _can_leave(self, live: Tensor) -> bool:
        staying = int(live.sum())
        # Under ZeRO-3 a rank that is done still takes part in the passes, with a row that nobody reads.
        return 0 < staying <= len(live) * (1 - _LEAVE_TOGETHER)

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int64 [N, T], mask int64 [N, P + T] and positions int64 [N, T], the shared beginning and then padding
        on the left."""
        own = [prompt[self.shared :] for prompt in prompts]
        longest = max(map(len, own))
        ids = [[self.pad] * (longest - len(prompt)) + prompt for prompt in own]
        mask = [[1] * self.shared + [0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in own]
        mask_NS = torch.tensor(mask, device=self.world.device)
        # Padding stands at position 0: no one sees it, and some tables of positions end.
        positions_NS = (mask_NS.cumsum(dim=1) - 1).clamp(min=0)
        return torch.tensor(ids, device=self.world.device), mask_NS, positions_NS[:, self.shared :]

    def _cache(self, rows: int, longest: int) -> Cache:
        slots = self.shared + longest + self.max_new_tokens
        if not self.shared:
            return decoding_cache.empty(slots)
        if self.beginning is None:
            beginning = decoding_cache.empty(self.shared)
            ids = torch.tensor([self.encoded[0][: self.shared]], device=self.world.device)
            self.model(input_ids=ids, past_key_values=beginning, use_cache=True, logits_to_keep=1)
            self.beginning = beginning
        return decoding_cache.repeated(self.beginning, rows, slots)

    def _shared(self) -> int:
        """How many tokens all prompts begin with; at least one of each is left."""
        longest = max(map(len, self.encoded), default=0)
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if len(self.encoded) < 2 or (window is not None and longest + self.max_new_tokens > window):
            # A sliding window counts the padding between beginning and prompt as distance.
            return 0
        first = self.encoded[0]
        shared = min(map(len, self.encoded)) - 1
        return next((at for at in range(shared) if any(ids[at] != first[at] for ids in self.encoded)), shared)


@contextmanager
def dense_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention over padded rows, as transformers computes it itself; packed prompts have one of their own."""
    before = model.config._attn_implementation
    model.set_attn_implementation(padded_attention(model.config))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def padded_attention(config: PretrainedConfig) -> str:
    """transformers' name for its fastest attention over padded rows that such a model can take."""
    # SDPA cannot cap scores.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else "sdpa"


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked out, so any existing token will do; the vocabulary is never resized.
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: a chat model's end of turn is often not the tokenizer's end of text."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return [token for token in {*tokens, tokenizer.eos_token_id} if token is not None]
