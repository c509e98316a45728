# ruff: noqa: RUF001  (the bars of the special tokens are the full-width ones, as released)
"""The tokenizer of the tiny target: byte-level BPE with DeepSeek's special tokens and chat format.

The released checkpoint ships no Jinja template; serving engines encode its messages in code
(vllm/tokenizers/deepseek_v32_encoding.py). `CHAT_TEMPLATE` writes the same text for system, user and
assistant messages without tools, so that one tokenizer directory serves every engine.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.conversations import Conversation

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "train_tokenizer"]

# position in the tuple is the token id; the two thinking marks are ordinary text when decoding, as released
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
BOS, EOS = SPECIAL_TOKENS[:2]

# An answer opens with `<think>` or, where there is no reasoning, with `</think>`. Reasoning is written in the
# content as `<think>...</think>answer` and dropped from every answer before the last user message.
CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}
{{- m.content -}}
{%- elif m.role == 'user' -%}
{{- '<｜User｜>' + m.content + '<｜Assistant｜>' -}}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content -%}
{%- if loop.index0 > ns.last_user and content.startswith('<think>') -%}
{{- content -}}
{%- else -%}
{{- '</think>' + content.split('</think>')[-1] -}}
{%- endif -%}
{{- eos_token -}}
{%- else -%}
{{- raise_exception('unknown role ' + m.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<think>' if thinking is defined and thinking else '</think>' -}}
{%- endif -%}"""

# words with one leading space, up to three digits, runs of punctuation, line ends, other white space
WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(conversations: Iterable[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the content of the messages.

    Returns:
        a tokenizer of `vocab_size` tokens, or fewer where the text yields fewer merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, special=i < 4, normalized=False) for i, t in enumerate(SPECIAL_TOKENS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (message["content"] for c in conversations for message in c.messages)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(tokens[4:])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=163840
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
