"""Render conversations with the model's chat template, and find what the assistant wrote in the result.

A template is a program that comes with the model. transformers runs it in a sandbox, and `Limits` bounds it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prune_distill.data.limits import LimitError, Limits
from prune_distill.data.messages import FIELDS, ConversationError, Message, prompt_messages, read_messages, read_tools
from prune_distill.data.tokenizer import transformers_tokenizer
from prune_distill.errors import InputError
from prune_distill.schema import Learn

# Limits of a chat template per rendering of a conversation.
CHAT_SECONDS = 10.0
CHAT_BYTES = 2**30
# Maximum characters of the result: a constant (system prompt, tools) plus a multiple of the conversation's.
CHAT_OWN_CHARACTERS = 2**20
CHAT_SHARE = 64
# A private-use character, which no conversation contains.
PROBE = "\uf8f1"
ANSWER = {"role": "assistant", "content": "2"}
# Templates with these markers say themselves what the assistant writes (`return_assistant_tokens_mask`).
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tools = list[dict[str, Any]] | None
# Characters [start, end) of a text.
Span = tuple[int, int]
NO_PROMPT = "a turn of the assistant does not begin as the chat template's generation prompt does"


class ChatTemplate:
    """The chat template of a Hugging Face folder.

    Raises:
        InputError: on a call, if the template reaches a limit. Other conversations would reach it too, so they are not
            counted as invalid.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._limits = Limits(CHAT_SECONDS, CHAT_BYTES)
        self._tokenizer = transformers_tokenizer(folder)
        question, call = (
            {"role": "user", "content": "1"},
            {"type": "function", "function": {"name": PROBE, "arguments": {}}},
        )
        # At least those of the last message.
        self._thinks = self._writes_probe([question, {**ANSWER, "reasoning_content": PROBE}], otherwise=False)
        self._calls = self._writes_probe([question, {**ANSWER, "content": "", "tool_calls": [call]}], otherwise=True)

    def render_prompt(self, messages: Any, tools: Any = None) -> str:
        """Render the messages before the last one of the assistant, and the beginning of the assistant's answer.

        Args:
            messages, tools: the fields of a record.

        Raises:
            ValueError: they are not a conversation, or the template rejects them.
        """
        conversation, schemas = self._read(messages, tools)
        return self._checked(lambda: self._render(prompt_messages(conversation), schemas, add_generation_prompt=True))

    def encode_prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """Return the ids of `render_prompt`."""
        ids: list[int] = self._tokenizer(self.render_prompt(messages, tools), add_special_tokens=False)["input_ids"]
        return ids

    def other_fields(self, messages: Any) -> set[str]:
        """Return the names of fields in messages that this module does not know; the template may read them."""
        return {name for message in read_messages(messages) for name in message} - FIELDS

    def render(
        self, messages: Any, tools: Any = None, learn: Learn = Learn.all, split_turns: bool = False
    ) -> list[tuple[str, tuple[Span, ...] | None]]:
        """Render a conversation.

        Args:
            messages, tools: the fields of a record.
            split_turns: whether turns of the assistant that the template renders differently when messages follow
                become texts of their own, each of the conversation up to that turn.

        Returns:
            Texts, each with the spans of characters that are learned; None: all.

        Raises:
            ValueError: they are not a conversation, or the template rejects them.
        """
        conversation, schemas = self._read(messages, tools)
        if not conversation:
            return [("", None)]
        return self._checked(lambda: self._rendered(conversation, schemas, learn, split_turns))

    def _read(self, messages: Any, tools: Any) -> tuple[list[Message], Tools]:
        conversation = read_messages(messages)
        if not self._thinks:
            conversation = [_inline_reasoning(message) for message in conversation]
        return conversation, read_tools(tools)

    def _checked(self, call: Any) -> Any:
        try:
            return call()
        except ConversationError:
            raise
        except LimitError as limit:
            raise InputError(
                f"the chat template in {self._folder} {limit} for one conversation; fix the template, or remove the"
                " conversation if it should not be that long"
            ) from limit
        except Exception as error:  # templates raise errors of any kind
            raise ValueError(f"the chat template rejects the messages ({error})") from error

    def _rendered(
        self, messages: list[Message], tools: Tools, learn: Learn, split_turns: bool
    ) -> list[tuple[str, tuple[Span, ...] | None]]:
        text = self._render(messages, tools)
        for number, message in enumerate(messages, start=1):
            if self._is_left_out(message, text):
                raise ConversationError(
                    f"the chat template leaves out message {number}, of the role {message['role']!r}, or a part of it"
                )
        if learn is Learn.all:
            return [(text, None)]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise ConversationError("there is no message of the assistant to learn")
        if learn is Learn.last_assistant:
            return [(text, tuple(self._spans(messages, tools, text, turns[-1:])))]
        if not split_turns:
            return [(text, tuple(self._spans(messages, tools, text, turns)))]
        return [
            (part, tuple(self._spans(messages[: group[-1] + 1], tools, part, group)))
            for part, group in self._group(messages, tools, turns)
        ]

    def _group(self, messages: list[Message], tools: Tools, turns: list[int]) -> list[tuple[str, list[int]]]:
        """Group successive turns of which each is rendered in the conversation up to the last one as up to itself."""
        groups: list[tuple[str, list[int]]] = []
        for turn in reversed(turns):
            text = self._render(messages[: turn + 1], tools)
            if groups and groups[0][0].startswith(text):
                groups[0][1].insert(0, turn)
            else:
                groups.insert(0, (text, [turn]))
        return groups

    def _spans(self, messages: list[Message], tools: Tools, text: str, turns: Sequence[int]) -> list[Span]:
        """Return the spans of the assistant's turns in the rendered conversation: what a model generates.

        Each begins after the generation prompt and ends with what the template writes after the message.
        """
        if _GENERATION.search(self._tokenizer.get_chat_template(tools=tools)):
            return self._marked_spans(messages, tools, turns)
        spans: list[Span] = []
        for turn in turns:
            alone = self._render(messages[: turn + 1], tools)
            if text.startswith(alone):
                span = self._start(messages[:turn], tools, messages[turn], alone), len(alone)
            else:
                span = self._find(messages, tools, turn, text, alone)
            if spans and span[0] < spans[-1][1]:
                raise ConversationError("the turns of the assistant cannot be told apart in what the template renders")
            spans.append(span)
        return spans

    def _marked_spans(self, messages: list[Message], tools: Tools, turns: Sequence[int]) -> list[Span]:
        """Return the spans that the template marks, from the first of the turns on."""
        before = self._marks(messages[: turns[0]], tools) if turns[0] else []
        return self._marks(messages, tools)[len(before) :]

    def _start(self, before: list[Message], tools: Tools, message: Message, text: str) -> int:
        """Return where the assistant's turn begins in the conversation up to it."""
        if not before:
            headers = self._headers(before, tools, message)
            return max((text.find(header) + len(header) for header in headers if header in text), default=0)
        prompts = self._prompts(before, tools, message)
        for prompt in prompts:
            if text.startswith(prompt):
                return len(prompt)
        # Whatever the prompt has in common with the turn, but more than with the end of the conversation.
        start = max(_common_prefix(text, prompt) for prompt in prompts)
        if start <= _common_prefix(self._render(before, tools), text):
            raise ConversationError(NO_PROMPT)
        return start

    def _prompts(self, before: list[Message], tools: Tools, message: Message | None) -> list[str]:
        """Render the prompts that a message may answer; None: any message.

        A message without thinking answers the prompt of `enable_thinking=False`, which in some templates ends with an
        empty thought.
        """
        thinks = message is not None and _thinks(message)
        settings: list[dict[str, bool]] = [{}] if thinks else [{"enable_thinking": False}, {}]
        return [self._render(before, tools, add_generation_prompt=True, **more) for more in settings]

    def _headers(self, before: list[Message], tools: Tools, message: Message | None) -> list[str]:
        """Return what the prompts that a message may answer append to the conversation."""
        before = before or [{"role": "user", "content": PROBE}]
        prefix = self._render(before, tools)
        return [prompt[_common_prefix(prefix, prompt) :] for prompt in self._prompts(before, tools, message)]

    def _find(self, messages: list[Message], tools: Tools, turn: int, text: str, alone: str) -> Span:
        """Return the span of a turn that the template renders differently when messages follow.

        Qwen3's drops the thinking of earlier turns, for one. The texts of the conversation and of the same one with
        another message in that turn differ in what the template takes from the message. Before it stands a generation
        prompt, and after it what follows the message if it is the last one.
        """
        before, changed = messages[:turn], _change(messages[turn])
        other = self._render([*before, changed, *messages[turn + 1 :]], tools)
        first, end = _common_prefix(text, other), len(text) - _common_suffix(text, other)
        headers = self._headers(before, tools, None)
        whole = [text.rfind(header, 0, first) + len(header) for header in headers if header in text[:first]]
        partial = [first for header in headers if _ends_with_most_of(text[:first], header)]
        if not whole and not partial:
            raise ConversationError(NO_PROMPT)
        start = max(whole + partial)
        last = self._render([*before, changed], tools)
        ending = alone[len(alone) - _common_suffix(alone, last) :]
        end += _common_prefix(ending, text[end : end + len(ending)])
        if start >= end or not alone.endswith(text[start:end]):
            raise ConversationError(
                "the chat template changes a turn of the assistant in other ways than leaving out its thinking when"
                " messages follow; set data.split_turns=true or data.learn=last_assistant"
            )
        return start, end

    def _is_left_out(self, message: Message, text: str) -> bool:
        """Return whether a rendered conversation lacks a message.

        Results of tools are not looked for, as they may be escaped, and neither is the content of a message with calls,
        of which some templates write one or the other.
        """
        if "tool_calls" in message:
            return not self._calls
        return message["role"] != "tool" and message["content"].split("</think>")[-1].strip() not in text

    def _writes_probe(self, messages: list[Message], otherwise: bool) -> bool:
        """Return whether the template writes `PROBE`; `otherwise`, if it rejects the messages."""
        try:
            return PROBE in self._render(messages, None)
        except (Exception, LimitError):  # reported with the first conversation
            return otherwise

    def _render(self, messages: list[Message], tools: Tools, **options: Any) -> str:
        with self._limits.applied():
            text: str = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
            if len(text) > CHAT_OWN_CHARACTERS and len(text) > CHAT_OWN_CHARACTERS + CHAT_SHARE * len(
                repr((messages, tools))
            ):
                raise LimitError(f"writes {len(text):,} characters")
        return text

    def _marks(self, messages: list[Message], tools: Tools) -> list[Span]:
        """Return the characters of successive tokens that the template marks."""
        options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
        with self._limits.applied():
            found = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenizer_kwargs={"return_offsets_mapping": True}, **options
            )
        spans: list[Span] = []
        marks = found["assistant_masks"]
        for (start, end), mark, before in zip(found["offset_mapping"], marks, [0, *marks], strict=False):
            if mark:
                spans.append((spans.pop()[0] if before else start, end))
        return spans


def _ends_with_most_of(text: str, header: str) -> bool:
    """Return whether a text ends with a beginning of `header` that is at least half of it: that without thinking."""
    return any(text.endswith(header[:size]) for size in range(len(header), len(header) // 2, -1))


def _thinks(message: Message) -> bool:
    return "reasoning_content" in message or "</think>" in message["content"]


def _inline_reasoning(message: Message) -> Message:
    """Write the reasoning into the content, for a template that does not read it."""
    if "reasoning_content" not in message:
        return message
    others = {name: value for name, value in message.items() if name != "reasoning_content"}
    answer = f"\n\n{message['content']}" if message["content"] else ""
    return {**others, "content": f"<think>\n{message['reasoning_content']}\n</think>{answer}"}


def _change(message: Message) -> Message:
    """Return a message of the same kind without a character in common at either end of what it says."""
    changed = {**message, "content": PROBE if message["content"] else ""}
    changed.pop("reasoning_content", None)
    if "tool_calls" in message:
        calls = [{**call["function"], "name": PROBE, "arguments": {PROBE: PROBE}} for call in message["tool_calls"]]
        changed["tool_calls"] = [
            {**call, "function": function} for call, function in zip(message["tool_calls"], calls, strict=True)
        ]
    return changed


def _common_prefix(one: str, other: str) -> int:
    """Return the length of the longest common prefix. Comparing slices is faster than a loop over characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_suffix(one: str, other: str) -> int:
    return _common_prefix(one[::-1], other[::-1])
