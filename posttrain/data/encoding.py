"""How text becomes tokens, and the count of what happened to it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens: the part of the configuration that a cached token file depends on.

    template: "chat" or "none". prompt_is_target: the stage trains on every token (pretrain).
    closes: every response ends with an end-of-turn token; one that was cut or has none gets it.
    on_too_long: "drop", "truncate", "split" or "error" for a Group longer than max_length tokens.
    train_on: which turns of a conversation are targets: "all" or the "last" of the assistant's, those of the "response"
        alone, or all of these roles.
    answer_tokens: room that a prompt without responses must leave for the answer.
    """

    template: str
    max_length: int
    on_too_long: str
    train_on: str | list[str] = "all"
    prompt_is_target: bool = False
    closes: bool = False
    answer_tokens: int = 0


@dataclass
class Counts:
    """What happened to the rows; every number here is shown to the user.

    notes: what else is told → how often. facts: what holds for all of them. examples: the first few messages of a kind.
    """

    groups: int = 0
    kept: int = 0
    too_long: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    nothing_trained: int = 0
    unrenderable: int = 0
    windows: int = 0
    split: int = 0
    split_into: int = 0
    no_end_of_turn: int = 0
    duplicates: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Groups that will not be trained on."""
        return self.too_long + self.nothing_trained + self.unrenderable

    def lines(self, encoding: Encoding) -> list[str]:
        """One line for everything dropped, cut or odd; none if there is nothing to say."""
        told = {
            f"dropped: longer than data.max_length={encoding.max_length} tokens": self.too_long,
            f"truncated to data.max_length={encoding.max_length} ({self.cut_tokens:,} tokens cut)": self.truncated,
            "dropped: no token left to train on": self.nothing_trained,
            "skipped: the chat template cannot render them": self.unrenderable,
            "windows cut from long text": self.windows,
            f"conversations made into {self.split_into:,} examples: the chat template shows an answer differently once "
            "the conversation goes on (without its thinking, say), so such an answer is trained where it is the last": (
                self.split
            ),
            "train no end-of-turn token: generation may not know when to stop": self.no_end_of_turn,
            "occur more than once (kept)": self.duplicates,
            **self.notes,
        }
        lines = [f"{count:,} {what}" for what, count in told.items() if count]
        return lines + [f"  {message}" for messages in self.examples.values() for message in messages] + self.facts

    def note(self, what: str, message: str) -> None:
        """Keep the first few messages of a kind."""
        kept = self.examples.setdefault(what, [])
        if len(kept) < 5 and message not in kept:
            kept.append(message)

    def say(self, what: str) -> None:
        """Count one more of what is told in these words."""
        self.notes[what] = self.notes.get(what, 0) + 1
