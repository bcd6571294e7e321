"""Every spelling of a message and a conversation, read into tuples of Message."""

from __future__ import annotations

from typing import Any

from posttrain.data.group import Message, Text
from posttrain.data.rows import Row, shown

# Names that data sets give to the speakers. A name not listed stays as it is, for the chat template to know or refuse.
SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
FLAG_KEYS = ("train", "weight")
INSTEAD_OF_TEXT = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "thinking",
)  # a message with one may lack content
KNOWN_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *FLAG_KEYS))

A_MESSAGE = '{"role": ..., "content": ...}, {"from": ..., "value": ...} or {"system": text}'
A_CONVERSATION = f"a list of messages, each {A_MESSAGE}"


def conversation(row: Row, role: str) -> tuple[Message, ...]:
    """The messages at `role`, with the row's system column in front; at most one system message."""
    items = row.listed(role, A_CONVERSATION)
    messages = tuple(message(row, role, item, turn) for turn, item in enumerate(items, 1))
    return with_system(row, role, messages)


def with_system(row: Row, role: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the system column in front, if the row has one that is not blank."""
    if (system := row.optional_text("system")).strip():
        messages = (Message("system", system), *messages)
    if sum(m.role == "system" for m in messages) > 1:
        where = "the system column and the messages" if system.strip() else "the messages"
        row.fail(role, f"found two system messages (in {where})", "at most one")
    return messages


def message(row: Row, role: str, item: Any, turn: int) -> Message:
    """One message of any spelling; `turn` counts from 1, for errors."""
    if not isinstance(item, dict):
        row.fail(role, f"message {turn}: {shown(item)}", A_MESSAGE)
    item = {key: value for key, value in item.items() if value is not None}  # parquet fills absent keys with null
    if len(item) == 1 and (name := next(iter(item))) in SPEAKERS:
        speaker, content = name, item[name]
    else:
        speaker = next((item[key] for key in ROLE_KEYS if key in item), None)
        content = next((item[key] for key in CONTENT_KEYS if key in item), None)
        if not isinstance(speaker, str) or not speaker:
            row.fail(
                role, f"message {turn} names no speaker: it has {', '.join(map(str, item)) or 'no keys'}", A_MESSAGE
            )
    extra = {} if len(item) <= 2 and content is not None else {k: v for k, v in item.items() if k not in KNOWN_KEYS}
    speaker = SPEAKERS.get(speaker.lower(), speaker)
    may_lack = any(extra.get(key) for key in INSTEAD_OF_TEXT)
    text = _content(row, role, content, turn, may_lack)
    if not text.strip() and not may_lack and speaker in ("user", "assistant"):
        row.fail(role, f"message {turn} ({speaker}) is empty", "text that is not empty")
    return Message(speaker, text, _flag(row, role, item, turn) if len(item) > 2 else None, extra)


def _content(row: Row, role: str, content: Any, turn: int, may_lack: bool) -> str:
    """Text, or a list of typed parts whose text is joined. A message of tool calls may have none."""
    if isinstance(content, str):
        return content
    accepted = 'text, or a list of parts such as {"type": "text", "text": ...}'
    if content is None:
        if may_lack:
            return ""
        row.fail(role, f"message {turn} has no content", accepted)
    if not isinstance(content, list):
        row.fail(role, f"content of message {turn}: {shown(content)}", accepted)
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    ]
    for part, text in zip(content, texts, strict=True):
        if not isinstance(text, str):
            row.fail(role, f"a part of message {turn} holds no text: {shown(part)}", accepted)
    return "".join(text for text in texts if text)


def _flag(row: Row, role: str, item: dict[str, Any], turn: int) -> bool | None:
    """Whether this turn is trained: `train` (true or false) or `weight` (1 or 0), None where the row does not say."""
    value = next((item[key] for key in FLAG_KEYS if key in item), None)
    if value is None:
        return None
    if value not in (0, 1):
        row.fail(role, f"train or weight of message {turn}: {shown(value)}", "true or false, 1 or 0")
    return bool(value)


def text_or_messages(row: Row, role: str, value: Any) -> Text:
    """What a prompt or response column may hold: text, one message, or a list of messages."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list | tuple):
        if not value:
            row.fail(role, "found an empty list of messages", A_CONVERSATION)
        return tuple(message(row, role, item, turn) for turn, item in enumerate(value, 1))
    accepted = f"text that is not empty, a message, or {A_CONVERSATION}"
    if not isinstance(value, str):
        row.fail(role, shown(value), accepted)
    if not value.strip():
        row.fail(role, "found empty text" + (f" ({value!r})" if value else ""), accepted)
    return value


def prompt(row: Row, role: str = "prompt", text: str | None = None) -> Text:
    """The prompt at `role` (or the text given), as messages if it is a list of them or the row has a system text."""
    given: Any = text
    if text is None:
        given = (
            row.listed(role, A_CONVERSATION) if role == "messages" else row.need(role, "text, or a list of messages")
        )
    value = text_or_messages(row, role, given)
    if isinstance(value, str):
        return with_system(row, role, (Message("user", value),)) if row.optional_text("system").strip() else value
    messages = with_system(row, role, value)
    if messages[-1].role == "assistant":
        row.fail(role, "the prompt ends with an assistant turn", "a prompt that ends with what is to be answered")
    return messages


def response(row: Row, role: str, value: Any) -> Text:
    """One response; a list of messages must begin and end with an assistant turn."""
    answer = text_or_messages(row, role, value)
    if not isinstance(answer, str) and not (answer[0].role == answer[-1].role == "assistant"):
        turns = ", ".join(m.role for m in answer)
        row.fail(role, f"found the turns {turns}", "a response: one assistant turn, or several from one to another")
    return answer


def split_last_turn(row: Row, role: str = "messages", cut_trailing: bool = True) -> tuple[Text, Text]:
    """(messages before the last assistant turn, that turn).

    Turns after it train nothing and change nothing before them, so they are cut, and counted in the report; where the
    row judges its last turn (cut_trailing=False), they are an error.
    """
    messages = conversation(row, role)
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=None)
    if last is None:
        turns = ", ".join(dict.fromkeys(m.role for m in messages))
        row.fail(
            role, f"the conversation has no assistant turn, only {turns}", "a turn of assistant (or gpt, model, bot)"
        )
    if last == 0:
        row.fail(role, "nothing stands before the assistant's only turn", "a turn to answer; or data.format=text")
    if last + 1 < len(messages):
        if not cut_trailing:
            row.fail(
                role, f"the conversation ends with a {messages[-1].role} turn", "one that ends with the judged answer"
            )
        row.notes["conversations that end after their last assistant turn: the turns after it were cut"] += 1
    return messages[:last], messages[last : last + 1]


def same_kind(prompt: Text, responses: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """All text or, if any is messages, all messages: a text prompt becomes a user turn, a text response the answer."""
    if isinstance(prompt, str) and all(isinstance(r, str) for r in responses):
        return prompt, responses
    asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return asked, tuple((Message("assistant", r),) if isinstance(r, str) else r for r in responses)
