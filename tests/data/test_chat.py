"""Chats into tokens: prompts as the model will meet them, answers that end as the template ends them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dcr_scale.config import ModelConfig, load_config
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.packing import pack
from dcr_scale.errors import UserError
from dcr_scale.models.loading import read_tokenizer

GENERATION = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}" + GENERATION
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe of help.<|end|>\n{% endif %}" + TURNS
# Finished answers carry a block that the generation prompt leaves to the model.
THINKING = TURNS.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# No special token and no line break stand before the user's words, which are stripped.
PLAIN_WORDS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] | trim }}</s>"
    "{% else %}[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
# The answer does not follow what the generation prompt announced.
UNLIKE = "{% if add_generation_prompt %}<|start|>{% endif %}" + TURNS
TEMPLATES = {"turns": TURNS, "system": DEFAULT_SYSTEM, "thinking": THINKING, "words": PLAIN_WORDS, "none": None}


def tokenizer_with(template: str | None, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges reach over line breaks and spaces, as those of real vocabularies do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["user\n\n\nHow can the user\n\thelp?", "the assistant\n the user: [INST] a", "\n\n\n\t\n\t"] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|begin|>", "<|start|>", "<|end|>", "</s>"],
            show_progress=False,
        ),
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="</s>")
    fast.chat_template = template
    return fast


TOKENIZERS = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}
TOKENIZERS["begins"] = tokenizer_with(None, begins=True)

# Sources strip prompts and refuse empty ones.
prompts = st.text(min_size=1, max_size=20).map(str.strip).filter(bool)


def decoded(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- prompts ---------------------------------------------------------------------------------------------------


def test_a_prompt_ends_where_the_answer_begins():
    encoder = ChatEncoder(TOKENIZERS["system"])
    expected = "<|start|>system\nBe of help.<|end|>\n<|start|>user\nHi?<|end|>\n<|start|>assistant\n"
    assert decoded(encoder, encoder.encode("Hi?")) == expected
    assert decoded(ChatEncoder(TOKENIZERS["none"]), ChatEncoder(TOKENIZERS["none"]).encode("Hi?")) == "Hi?\n\n"


def test_the_system_prompt_is_the_configured_one():
    encoder = ChatEncoder(TOKENIZERS["system"], system_prompt="Rhyme.")
    assert decoded(encoder, encoder.encode("Hi?")).startswith("<|start|>system\nRhyme.<|end|>\n<|start|>user\n")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40)
@given(prompts=st.lists(prompts, min_size=1, max_size=4))
@example(prompts=["\u0308a", ".\n\nb", "user", "\u200b", "[INST]"])
def test_every_prompt_begins_with_the_prefix_and_goes_on(name, prompts):
    encoder = ChatEncoder(TOKENIZERS[name])
    # Raises where one of them does not.
    pack([encoder.encode(prompt) for prompt in prompts], prefix=encoder.prefix)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("system", "<|start|>system\nBe of help.<|end|>\n<|start|>user"),
        ("turns", "<|start|>user"),
        ("words", "[INST]"),
        ("begins", "<|begin|>"),
        ("none", ""),
    ],
)
def test_the_prefix_is_what_the_template_puts_in_front(name, header):
    encoder = ChatEncoder(TOKENIZERS[name])
    # A line break or space at its end may melt into the user's first token.
    assert decoded(encoder, encoder.encode("How?")[: encoder.prefix]).rstrip() == header


# --- examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("turns", "Sure.<|end|>"),
        ("system", "Sure.<|end|>"),
        ("thinking", "<think>\n\n</think>\n\nSure.<|end|>"),
        ("words", " Sure.</s>"),
        ("none", "Sure.</s>"),
    ],
)
def test_an_example_is_its_prompt_and_an_answer_that_ends_the_turn(name, answer):
    encoder = ChatEncoder(TOKENIZERS[name])
    whole = encoder.encode_example("Can you?", "Sure.", max_tokens=200)
    # Token for token what is generated from, so that training and use meet the same boundary.
    assert whole.ids[: whole.response_start] == encoder.encode("Can you?")
    assert decoded(encoder, whole.ids[whole.response_start :]) == answer


def test_the_end_of_the_turn_is_one_special_token():
    encoder = ChatEncoder(TOKENIZERS["turns"])
    whole = encoder.encode_example("Can you?", "Sure.", max_tokens=200)
    assert whole.ids[-1] == encoder.tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_template_that_writes_answers_unlike_its_generation_prompt_gets_the_plain_form():
    encoder = ChatEncoder(tokenizer_with(UNLIKE))
    whole = encoder.encode_example("Can you?", "Sure.", max_tokens=200)
    assert decoded(encoder, whole.ids[whole.response_start :]) == "Sure.</s>"


def test_a_long_answer_is_cut_and_its_prompt_is_not():
    encoder = ChatEncoder(TOKENIZERS["turns"])
    asked = encoder.encode("Can you?")
    whole = encoder.encode_example("Can you?", "Sure, with pleasure." * 9, max_tokens=200)
    cut = encoder.encode_example("Can you?", "Sure, with pleasure." * 9, max_tokens=len(asked) + 3)
    assert (len(cut.ids), cut.response_start) == (len(asked) + 3, len(asked))
    assert cut.ids == whole.ids[: len(cut.ids)]


# --- what does not fit -----------------------------------------------------------------------------------------


def test_an_overlong_prompt_is_an_error_that_quotes_it():
    encoder = ChatEncoder(TOKENIZERS["turns"])
    length = len(encoder.encode("How come?"))
    assert ChatEncoder(TOKENIZERS["turns"], max_prompt_tokens=length).encode_prompts(["How come?"], "them")
    with pytest.raises(UserError) as caught:
        ChatEncoder(TOKENIZERS["turns"], max_prompt_tokens=length - 1).encode_prompts(["How come?"], "them")
    message = str(caught.value)
    assert message.startswith(f"them: the prompt 'How come?'... has {length} tokens") and "\n" not in message
    assert f"limit of {length - 1}" in message and "data.max_prompt_tokens" in message


def test_overlong_prompts_can_be_dropped_and_keep_their_places():
    short, long = "Hm?", "How can the user help the assistant? " * 5
    encoder = ChatEncoder(TOKENIZERS["turns"], max_prompt_tokens=20, overlong="drop")
    assert encoder.encode_prompts([long, short, long], "them") == [None, encoder.encode(short), None]
    with pytest.raises(UserError, match=r"them: all 2 prompts are longer than data\.max_prompt_tokens=20"):
        encoder.encode_prompts([long, long], "them")
    assert encoder.encode_prompts([], "them") == [], "none was too long"


def test_a_prompt_that_leaves_no_token_to_its_answer_is_an_error():
    encoder = ChatEncoder(TOKENIZERS["turns"])
    length = len(encoder.encode("How come?"))
    assert len(encoder.encode_example("How come?", "So.", max_tokens=length + 1).ids) == length + 1
    with pytest.raises(UserError, match=r"over the limit of .*align\.max_tokens"):
        encoder.encode_example("How come?", "So.", max_tokens=length)


def test_a_template_that_refuses_system_messages_says_what_to_set():
    tokenizer = tokenizer_with(NO_SYSTEM + TURNS)
    assert ChatEncoder(tokenizer).encode("Hi?")
    with pytest.raises(UserError, match=r"System role not supported; .* set data\.system_prompt=null"):
        ChatEncoder(tokenizer, system_prompt="Rhyme.").encode("Hi?")


def test_the_date_is_the_same_every_day() -> None:
    """A run that is interrupted goes on with the prompts that it had, whatever the day."""
    dated = "Today is {{ strftime_now('%d %b %Y') }}.\n" + TURNS
    ids = ChatEncoder(tokenizer_with(dated)).encode("What day is it?")
    assert tokenizer_with(dated).decode(ids).startswith("Today is 26 Jul 2024.\n")


# As templates of models that can do without a thought have it.
SWITCHED = THINKING.replace(
    "<|start|>assistant\n{% endif %}",
    "<|start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)


def test_a_template_is_told_what_the_configuration_says(tmp_path: Path) -> None:
    tokenizer_with(SWITCHED).save_pretrained(tmp_path)
    as_it_is = ChatEncoder(read_tokenizer(tmp_path, ModelConfig()))
    assert decoded(as_it_is, as_it_is.encode("Hi?")).endswith("assistant\n")
    for override in ("model.template={enable_thinking: false}", "model.template.enable_thinking=false"):
        told = ChatEncoder(read_tokenizer(tmp_path, load_config(None, [override]).model))
        prompt, chat = told.encode("Hi?"), told.encode_example("Hi?", "Yes.", max_tokens=99)
        assert decoded(told, prompt).endswith("assistant\n<think>\n\n</think>\n\n")
        # The thought that is left out is the prompt's, and nothing to be learnt.
        assert chat is not None and decoded(told, chat.ids[chat.response_start :]) == "Yes.<|end|>"
        assert not told.opens_thought and not as_it_is.opens_thought
    opening = TURNS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert ChatEncoder(tokenizer_with(opening)).opens_thought
    # Whoever asks with the same tokenizer asks in the same way; an evaluation's identity has the template's digest.
    assert told.tokenizer.chat_template != as_it_is.tokenizer.chat_template


def test_what_no_template_can_be_told_is_refused(tmp_path: Path) -> None:
    tokenizer_with(SWITCHED).save_pretrained(tmp_path / "one")
    tokenizer_with(None).save_pretrained(tmp_path / "none")
    for name in ("enable_thinkng", "messages", "a b"):
        with pytest.raises(UserError, match=f"reads no variable {name}$"):
            read_tokenizer(tmp_path / "one", ModelConfig(template={name: True}))
    with pytest.raises(UserError, match=r"model\.template is given, and its tokenizer has no chat template"):
        read_tokenizer(tmp_path / "none", ModelConfig(template={"enable_thinking": False}))
    with pytest.raises(UserError, match=r"model\.template\.x: expected true or false, or a whole number, or text"):
        load_config(None, ["model.template={x: [1]}"])
