"""Chat templates: how a conversation is rendered, and which of its characters are targets, by construction.

An answer's target text is what stands between the template's generation prompt and the end of that turn:
`render(messages[:i], add_generation_prompt)` must be a prefix of `render(messages[:i+1])`. Nothing is searched for. Where
the rendered whole does not begin with both of them, because the template shows an answer differently once the
conversation goes on, the answer is trained in a rendering of its own that ends with it, which is how the model wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posttrain.data.group import Group, Message, Text
from posttrain.errors import DataError

NO_THINKING = (
    "answers are trained without their thinking, which the chat template leaves out; set model.chat_template to one that "
    "keeps it in the last turn"
)
NO_TOOLS = "list tools that the chat template does not show to the model; set model.chat_template to one that does"


class Turn(NamedTuple):
    """Character positions: text[:start] is what the model is given, text[start:stop] the target.

    answer: the assistant's turn, which generation will have to end.
    """

    start: int
    stop: int
    answer: bool


@dataclass(slots=True)
class Rendered:
    """The first `messages` messages of a conversation as text, and the turns that are trained in this rendering."""

    text: str
    messages: int
    turns: list[Turn] = field(default_factory=list)


class NotPrefixStable(DataError):
    """The template's rendering of an answer does not begin with the prompt that the template makes for it."""


class Template:
    """A tokenizer's chat template. train_on: as in Encoding; `say` is told what the template leaves out.

    A message's own `train` flag decides over train_on, whatever its role.
    """

    def __init__(self, tokenizer: Any, train_on: str | list[str] = "all", say: Callable[[str], None] = print) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.roles = ("assistant",) if isinstance(train_on, str) else tuple(train_on)
        self.last_only, self.response_only = train_on == "last", train_on == "response"
        self.eos = tokenizer.eos_token or ""
        self.shows_tools = "tools" in str(tokenizer.chat_template)
        self.shown: dict[str, bool] = {"user": True, "assistant": True}

    def render(self, messages: Sequence[Message], tools: Any = None, given: int = 0) -> list[Rendered]:
        """The renderings in which every trained turn stands as the model would write it: as few as that takes.

        given: how many messages are the prompt's; with train_on "response" none of them is trained.

        Usually one, of the whole. Built from the last turn backwards: a turn joins the rendering at hand if it stands
        there unchanged; else that is closed, and the next one ends with this turn.
        """
        chat, tools = [message.as_dict() for message in messages], self._tools(tools)
        view = Rendered(self._apply(chat, tools), len(chat))
        views = [view]
        for i in reversed(self._trained(messages, given)):
            answer = messages[i].role == "assistant"
            before = self._apply(chat[:i], tools, generation_prompt=answer) if i else ""
            alone = view.text if i + 1 == view.messages else self._apply(chat[: i + 1], tools)
            turn = self._place(view.text, before, alone, answer)
            if turn is None and alone != view.text:
                view = Rendered(alone, i + 1)
                views.append(view)
                turn = self._place(alone, before, alone, answer)
            if turn is None:
                raise NotPrefixStable(_differs(view.text, before, i))
            self._check_kept(messages[i], view.text[turn.start : turn.stop])
            view.turns.insert(0, turn)
        self._check_roles(messages, chat, tools, views[0].text)
        return [view for view in reversed(views) if view.turns] or views

    def prompt(self, prompt: Text, tools: Any = None) -> str:
        """The prompt alone, up to and with the generation prompt."""
        chat = [message.as_dict() for message in as_messages(prompt, "user")]
        return self._apply(chat, self._tools(tools), generation_prompt=True)

    def _trained(self, messages: Sequence[Message], given: int) -> list[int]:
        turns = [i for i, message in enumerate(messages) if message.role in self.roles]
        if self.response_only:
            return [i for i in turns if i >= given]
        chosen = set(turns[-1:] if self.last_only else turns)
        return [i for i, m in enumerate(messages) if (i in chosen if m.train is None else m.train)]

    def _place(self, text: str, given: str, alone: str, answer: bool) -> Turn | None:
        """Where the turn stands in the text; None if the text does not begin with the prompt and the turn."""
        start, stop = self._length(text, given, may_end=not answer), self._length(text, alone, may_end=True)
        return None if start is None or stop is None or start >= stop else Turn(start, stop, answer)

    def _length(self, text: str, part: str, may_end: bool) -> int | None:
        """Length of the part that the text begins with; an end-of-text that closes it (Phi 3.5) need not be there."""
        if text.startswith(part):
            return len(part)
        open_part = part.removesuffix(self.eos)
        return len(open_part) if may_end and text.startswith(open_part) else None

    def _apply(self, chat: list[dict[str, Any]], tools: Any, generation_prompt: bool = False) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generation_prompt, **({"tools": tools} if tools else {})
            )
        except Exception as error:  # Jinja and the template itself raise anything; all of it is about this conversation
            roles = ", ".join(message["role"] for message in chat)
            raise DataError(
                f"the chat template refuses the roles [{roles}]: {type(error).__name__}: {error}"
            ) from error
        return str(rendered)

    def _tools(self, tools: Any) -> Any:
        """The row's tools as a list; files often hold them as JSON text."""
        if isinstance(tools, str) and tools.strip():
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise DataError(f"the column tools is no JSON: {error}") from error
        if tools and not self.shows_tools:
            self.say(NO_TOOLS)
        return tools or None

    def _check_kept(self, message: Message, target: str) -> None:
        """A trained turn that lost its tool calls teaches silence; one that lost its thinking is counted."""
        if not message.extra and "</think>" not in message.content:
            return
        for call in message.extra.get("tool_calls") or ():
            name = str((call.get("function") or call).get("name"))
            if name not in target:
                raise DataError(
                    f"the chat template leaves out the call of {name}; set model.chat_template to one for tools"
                )
        thinking = message.extra.get("reasoning_content") or message.extra.get("thinking") or ""
        if str(thinking).strip() not in target or ("</think>" in message.content and "</think>" not in target):
            self.say(NO_THINKING)

    def _check_roles(self, messages: Sequence[Message], chat: list[dict[str, Any]], tools: Any, text: str) -> None:
        """Templates skip roles they don't know without a word: found out once a role, by changing such a message."""
        for i, message in enumerate(messages):
            if message.role not in self.shown:
                changed = [*chat[:i], {**chat[i], "content": message.content + "."}, *chat[i + 1 :]]
                self.shown[message.role] = self._apply(changed, tools) != text
            if not self.shown[message.role]:
                raise DataError(
                    f"the chat template leaves out messages of the role {message.role}, which the answer builds on; "
                    "set model.chat_template to one that shows them"
                )


def as_messages(text: Text | None, role: str) -> tuple[Message, ...]:
    """Plain text becomes one turn of this role."""
    if text is None:
        return ()
    return (Message(role, text),) if isinstance(text, str) else tuple(text)


def conversation(group: Group, response: Text) -> tuple[Message, ...]:
    """Prompt and response as one conversation."""
    return as_messages(group.prompt, "user") + as_messages(response, "assistant")


def _differs(text: str, given: str, turn: int) -> str:
    """Where prompt and rendering part, and what to do about it."""
    split = next((i for i, (a, b) in enumerate(zip(text, given, strict=False)) if a != b), min(len(text), len(given)))
    before, prompt, rendered = given[max(0, split - 20) : split], given[split : split + 30], text[split : split + 30]
    what = f"after {before!r} the prompt goes on with {prompt!r}" if prompt else "the turn adds nothing to the prompt"
    return (
        f"message {turn + 1} does not continue the prompt that the chat template makes for it: {what}, "
        f"the rendered conversation with {rendered!r}. The model would be asked otherwise than it was trained: set "
        "model.chat_template to one whose generation prompt begins the turn as it is rendered"
    )
