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
# Roles that every template renders or rejects. Templates such as Qwen3's drop messages of other roles silently.
ROLES = ("system", "user", "assistant", "tool")
# A private-use character, which no conversation contains.
PROBE = "\uf8f1"
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
        self._thinks = self._renders_reasoning()

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
        for message in messages:
            if message["role"] not in ROLES and message["content"].strip() not in text:
                raise ConversationError(f"the chat template leaves out the message of the role {message['role']!r}")
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
        headers = self._headers(before, tools, message)
        if not before:
            return max((text.find(header) + len(header) for header in headers if header in text), default=0)
        prefix = self._render(before, tools)
        for header in headers:
            if text.startswith(header, len(prefix)):
                return len(prefix) + len(header)
        start = max((_common_prefix(text, prefix + header) for header in headers), default=0)
        if start <= len(prefix):
            raise ConversationError(NO_PROMPT)
        return start

    def _headers(self, before: list[Message], tools: Tools, message: Message | None) -> list[str]:
        """Return what the prompts that a message may answer append to the conversation.

        A message without thinking answers the prompt of `enable_thinking=False`, which in some templates ends with an
        empty thought. `message` None: any message.
        """
        before = before or [{"role": "user", "content": PROBE}]
        prefix, thinks = self._render(before, tools), message is not None and _thinks(message)
        settings: list[dict[str, bool]] = [{}] if thinks else [{"enable_thinking": False}, {}]
        prompts = [self._render(before, tools, add_generation_prompt=True, **more) for more in settings]
        return [prompt.removeprefix(prefix) for prompt in prompts if prompt.startswith(prefix)]

    def _find(self, messages: list[Message], tools: Tools, turn: int, text: str, alone: str) -> Span:
        """Return the span of a turn that the template renders differently when messages follow.

        Qwen3's drops the thinking of earlier turns, for one. The texts of the conversation and of the same one with
        another message in that turn differ in what the template takes from the message. Before it stands a generation
        prompt, and after it what follows the message if it is the last one.
        """
        before, changed = messages[:turn], _change(messages[turn])
        other = self._render([*before, changed, *messages[turn + 1 :]], tools)
        first, end = _common_prefix(text, other), len(text) - _common_suffix(text, other)
        headers = [header for header in self._headers(before, tools, None) if header in text[:first]]
        if not headers:
            raise ConversationError(NO_PROMPT)
        start = max(text.rfind(header, 0, first) + len(header) for header in headers)
        last = self._render([*before, changed], tools)
        ending = alone[len(alone) - _common_suffix(alone, last) :]
        return start, end + _common_prefix(ending, text[end : end + len(ending)])

    def _renders_reasoning(self) -> bool:
        """Return whether the template writes `reasoning_content`, at least that of the last message."""
        probe = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "reasoning_content": PROBE}]
        try:
            return PROBE in self._render(probe, None)
        except (Exception, LimitError):  # reported with the first conversation
            return False

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
