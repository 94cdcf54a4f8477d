"""Prompts and answers into token ids, through the tokenizer's own chat template."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from dcr_scale.config import DataConfig
from dcr_scale.errors import UserError

log = logging.getLogger(__name__)

# What a template is told that asks for the date: the one that Llama 3.1's names where nobody tells it another.
_DATE = date(2024, 7, 26)
_ASKED_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")

# Unlike enough that no template and no tokenizer makes them begin alike by accident.
_PROBES = ("a", "B?", "1", '"', "é", "<", "\t")


@dataclass(frozen=True)
class EncodedExample:
    """A prompt with its answer: ``ids``, of which ``ids[response_start:]`` is the answer."""

    ids: list[int]
    response_start: int


class ChatEncoder:
    """Encodes single-turn chats as the model will see them when it is used.

    A tokenizer without a chat template gets the prompt, a blank line, and the answer: base models have no turns.

    Args:
        tokenizer: the checkpoint's own.
        system_prompt: system message of every chat; None leaves it to the template.
        max_prompt_tokens: longest prompt, template included.
        overlong: ``error`` raises at a longer prompt, ``drop`` leaves it out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        max_prompt_tokens: int = 256,
        overlong: Literal["error", "drop"] = "error",
    ):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong = overlong

    @classmethod
    def configured(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> ChatEncoder:
        """The encoder of a run whose ``data`` this is."""
        return cls(
            tokenizer,
            system_prompt=data.system_prompt,
            max_prompt_tokens=data.max_prompt_tokens,
            overlong=data.overlong,
        )

    @cached_property
    def _template(self) -> str | None:
        """The tokenizer's own. One that asks for the date gets the same every day: a run that goes on tomorrow has the
        prompts of today."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            return None
        return _ASKED_DATE.sub(lambda asked: repr(_DATE.strftime(asked["format"])), template)

    @cached_property
    def prefix(self) -> int:
        """How many leading tokens every prompt shares: what the template puts before the user's words."""
        probes = [self.encode(probe) for probe in _PROBES]
        shared = 0
        while all(len(ids) > shared + 1 and ids[shared] == probes[0][shared] for ids in probes):
            shared += 1
        return shared

    @cached_property
    def opens_thought(self) -> bool:
        """Whether every prompt ends with a thought's beginning, as DeepSeek-R1's does."""
        return self.tokenizer.chat_template is not None and self._render("a").rstrip().endswith("<think>")

    def encode(self, prompt: str) -> list[int]:
        """A prompt up to the point where the answer's first token is generated."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{prompt}\n\n").input_ids
        return self._tokens(self._render(prompt))

    def encode_prompts(self, prompts: Sequence[str], what: str) -> list[list[int] | None]:
        """Encode many; None stands for a prompt that was too long and dropped.

        Raises UserError (naming ``what`` the prompts are) where one is too long and overlong is ``error``, or where
        all were dropped.
        """
        encoded: list[list[int] | None] = []
        for prompt in prompts:
            ids = self.encode(prompt)
            encoded.append(ids if self._fits(prompt, ids, what) else None)
        dropped = sum(ids is None for ids in encoded)
        if dropped and dropped == len(encoded):
            raise UserError(
                f"{what}: all {dropped} prompts are longer than data.max_prompt_tokens={self.max_prompt_tokens}"
            )
        if dropped:
            log.info("%s: dropped %d of %d prompts as too long", what, dropped, len(encoded))
        return encoded

    def encode_example(self, prompt: str, response: str, *, max_tokens: int) -> EncodedExample | None:
        """A chat with its answer and the end of the assistant's turn; the answer is cut at ``max_tokens`` in all.

        None stands for a prompt that leaves no room for an answer and was dropped; UserError where overlong is
        ``error``.
        """
        prompt_ids = self.encode(prompt)
        if not self._fits(prompt, prompt_ids, "stage 2", limit=max_tokens - 1):
            return None
        answer_ids = self._tokens(self._answer(prompt, response))
        return EncodedExample((prompt_ids + answer_ids)[:max_tokens], len(prompt_ids))

    def encode_opening(self, opening: str) -> list[int]:
        """The first words of an answer, as the token ids that follow a prompt's."""
        answer = self._answer("a", opening) if self.tokenizer.chat_template is not None else opening
        return self._tokens(answer[: answer.index(opening) + len(opening)])

    def _answer(self, prompt: str, response: str) -> str:
        """What follows the prompt in a finished chat: the answer and the turn's end, as the template writes them."""
        plain = response + (self.tokenizer.eos_token or "")
        if self.tokenizer.chat_template is None:
            return plain
        asked, answered = self._render(prompt), self._render(prompt, response)
        # A template may write the two differently (it strips, or drops a header): then the plain form must do.
        return answered[len(asked) :].rstrip() if answered.startswith(asked) else plain

    def _render(self, prompt: str, response: str | None = None) -> str:
        messages = [{"role": "user", "content": prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=response is None
            )
        except Exception as error:  # templates are Jinja programs and raise what they like
            hint = "; it may take no system message: set data.system_prompt=null" if self.system_prompt else ""
            raise UserError(f"the tokenizer's chat template failed: {error}{hint}") from error
        return cast(str, text)

    def _tokens(self, text: str) -> list[int]:
        # The template has written the special tokens into the text.
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _fits(self, prompt: str, ids: list[int], what: str, limit: int | None = None) -> bool:
        limit = self.max_prompt_tokens if limit is None else limit
        if len(ids) <= limit:
            return True
        if self.overlong == "drop":
            return False
        setting = "align.max_tokens" if what == "stage 2" else "data.max_prompt_tokens"
        raise UserError(
            f"{what}: the prompt {prompt[:60]!r}... has {len(ids)} tokens with its chat template, over the limit of "
            f"{limit}; raise {setting}, or set data.overlong=drop"
        )
