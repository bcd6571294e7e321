"""Group → TokenGroup: template, targets by construction, length policy, and a count of everything dropped or cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from posttrain.data.documents import Documents
from posttrain.data.group import Group
from posttrain.data.template import Rendered, conversation, render, special_pattern
from posttrain.data.tokens import TokenGroup
from posttrain.errors import DataError, ModelError

BATCH = 512


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens: the part of the configuration that a cached token file depends on.

    template: "chat" or "none". prompt_is_target: the stage trains on every token (pretrain).
    on_too_long: "drop", "truncate", "split" or "error" for a Group longer than max_length tokens.
    """

    template: str
    max_length: int
    on_too_long: str
    train_on: str = "all"
    prompt_is_target: bool = False


@dataclass
class Counts:
    """What happened to the rows; every number here is shown to the user."""

    groups: int = 0
    kept: int = 0
    too_long: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    nothing_trained: int = 0
    unrenderable: int = 0
    windows: int = 0
    no_end_of_turn: int = 0
    duplicates: int = 0
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
            "train no end-of-turn token: generation may not know when to stop": self.no_end_of_turn,
            "occur more than once (kept)": self.duplicates,
        }
        lines = [f"{count:,} {what}" for what, count in told.items() if count]
        return lines + [f"  {message}" for messages in self.examples.values() for message in messages]

    def note(self, what: str, message: str) -> None:
        """Keep the first few messages of a kind."""
        kept = self.examples.setdefault(what, [])
        if len(kept) < 5:
            kept.append(message)


class Tokenizer:
    """Turns Groups into TokenGroups in batches; `counts` fills up as they pass."""

    def __init__(self, tokenizer: Any, encoding: Encoding, on_bad_row: str = "error") -> None:
        self.tokenizer, self.encoding, self.on_bad_row = tokenizer, encoding, on_bad_row
        self.counts = Counts()
        self.seen: Counter[str] = Counter()
        self.bos, self.eos = beginning(tokenizer), tokenizer.eos_token_id
        self.specials = special_pattern(tokenizer)
        self.ends = end_ids(tokenizer)
        self.documents = Documents(tokenizer, self.bos, self.eos, encoding)
        if encoding.template == "chat" and not tokenizer.chat_template:
            raise ModelError("data.template=chat, but the tokenizer has no chat template; set model.chat_template")

    def groups(self, groups: Iterable[Group]) -> Iterator[TokenGroup]:
        """TokenGroups in the order of the Groups, without those that are dropped."""
        iterator = iter(groups)
        while part := list(islice(iterator, BATCH)):
            self.counts.groups += len(part)
            for token_group in self._encode(part):
                if self._fits(token_group):
                    self.counts.kept += 1
                    yield token_group

    def stream(self, blocks: Iterable[str], file: str) -> Iterator[TokenGroup]:
        """Windows of one endless document."""
        for window in self.documents.stream(blocks):
            self.counts.groups += 1
            self.counts.kept += 1
            self.counts.windows += 1
            yield window.token_group(self._name(Group(None, (window.text,), file=file)))

    def _name(self, group: Group) -> str:
        """The content id; a repeat's k-th occurrence gets the suffix -k."""
        name = group.content_id()
        self.seen[name] += 1
        occurrence = self.seen[name]
        self.counts.duplicates += occurrence > 1
        return name if occurrence == 1 else f"{name}-{occurrence}"

    def _encode(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        if all(group.prompt is None and isinstance(group.responses[0], str) for group in groups):
            yield from self._documents(groups, [str(group.responses[0]) for group in groups])
        elif self.encoding.template == "chat":
            yield from self._conversations(groups)
        else:
            yield from self._plain(groups)

    def _documents(self, groups: Sequence[Group], texts: list[str]) -> Iterator[TokenGroup]:
        for group, windows in zip(groups, self.documents.split(texts), strict=True):
            self.counts.nothing_trained += not windows
            self.counts.windows += len(windows) if len(windows) > 1 else 0
            name = self._name(group)
            for window in windows:
                yield window.token_group(name)

    def _plain(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        """Prompt and completion tokenised apart and concatenated, end-of-text appended."""
        texts = [text for group in groups for text in (group.prompt, *group.responses)]
        bad = next((t for t in texts if t is not None and not isinstance(t, str)), None)
        if bad is not None:
            raise ModelError(
                "the data holds messages, and there is no chat template to render them; set model.chat_template to a "
                "Jinja file, or use a model whose tokenizer has one"
            )
        ids = iter(self._ids([str(text or "") for text in texts]))
        for group in groups:
            prompt = next(ids)
            if self.bos and prompt[: len(self.bos)] != self.bos:
                prompt = self.bos + prompt
            responses = [self._ended(next(ids)) for _ in group.responses]
            masks = [[True] * len(response) for response in responses]
            yield self._token_group(group, prompt, responses, masks, [str(text) for text in group.responses])

    def _conversations(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        rendered: list[list[Rendered] | None] = [self._render(group) for group in groups]
        texts: dict[str, int] = {}
        for each in (r for conversations in rendered if conversations for r in conversations):
            for stop in (len(each.text), *(position for turn in each.turns for position in turn)):
                texts.setdefault(each.text[:stop], len(texts))
        ids = self._ids(list(texts))
        for group, conversations in zip(groups, rendered, strict=True):
            if conversations is None:
                continue
            try:
                yield self._assemble(group, conversations, texts, ids)
            except DataError as error:
                self._refuse(group, error)

    def _assemble(
        self, group: Group, rendered: list[Rendered], texts: dict[str, int], ids: list[list[int]]
    ) -> TokenGroup:
        prompts, responses, masks, targets = [], [], [], []
        for each in rendered:
            whole = ids[texts[each.text]]
            mask = np.zeros(len(whole), dtype=bool)
            for start, stop in each.turns:
                given = ids[texts[each.text[:start]]]
                if whole[: len(given)] != given:
                    raise DataError(
                        "the tokenised prompt is not a prefix of the tokenised whole: a token spans their border"
                    )
                mask[len(given) : common_prefix(whole, ids[texts[each.text[:stop]]])] = True
            first = len(ids[texts[each.text[: each.turns[0][0]]]]) if each.turns else len(whole)
            prompts.append(whole[:first])
            responses.append(whole[first:])
            masks.append(mask[first:].tolist())
            targets.append("".join(each.text[start:stop] for start, stop in each.turns))
        if any(prompt != prompts[0] for prompt in prompts):
            raise DataError("the responses' conversations do not begin with the same prompt tokens")
        if self.ends and not any(set(r) & self.ends for r in responses):
            self.counts.no_end_of_turn += 1
        return self._token_group(group, prompts[0], responses, masks, targets)

    def _render(self, group: Group) -> list[Rendered] | None:
        try:
            tools = group.columns.get("tools")
            return [
                render(self.tokenizer, conversation(group, r), self.encoding.train_on, tools) for r in group.responses
            ]
        except DataError as error:
            self._refuse(group, error)
            return None

    def _refuse(self, group: Group, error: DataError) -> None:
        message = f"{group.file}, row {group.row}: {error}"
        if self.on_bad_row == "error":
            raise DataError(message + "; data.on_bad_row=skip counts and lists such rows instead") from error
        self.counts.unrenderable += 1
        self.counts.note("unrenderable", message)

    def _token_group(
        self, group: Group, prompt: list[int], responses: list[list[int]], masks: list[list[bool]], targets: list[str]
    ) -> TokenGroup:
        if self.encoding.prompt_is_target:
            whole = prompt + responses[0]
            prompt, responses, masks = whole[:1], [whole[1:]], [[True] * (len(whole) - 1)]
            targets = [self.tokenizer.decode(whole[1:], skip_special_tokens=True)]
        plain = [self.specials.sub("", target) if self.specials else target for target in targets]
        name = self._name(group)
        return TokenGroup(
            id=name,
            cluster=name,
            prompt=prompt,
            responses=responses,
            masks=masks,
            bytes=[len(text.encode()) for text in plain],
            chars=[len(text) for text in plain],
            text=as_json(group),
            rewards=list(group.rewards or ()),
        )

    def _fits(self, group: TokenGroup) -> bool:
        """Apply the length policy; False drops the Group (counted)."""
        longest = max(group.lengths)
        if longest > self.encoding.max_length and not self._shorten(group, longest):
            self.counts.too_long += 1
            return False
        if not group.trained_tokens:
            self.counts.nothing_trained += 1
            return False
        return True

    def _shorten(self, group: TokenGroup, longest: int) -> bool:
        policy, room = self.encoding.on_too_long, self.encoding.max_length - len(group.prompt)
        if policy == "error":
            raise DataError(
                f"example {group.id} has {longest} tokens, over data.max_length={self.encoding.max_length}; "
                "raise it, or set data.on_too_long=drop or truncate"
            )
        if policy != "truncate" or room <= 0 or not any(any(mask[:room]) for mask in group.masks):
            return False
        self.counts.truncated += 1
        self.counts.cut_tokens += sum(max(0, length - self.encoding.max_length) for length in group.lengths)
        for k, (response, mask) in enumerate(zip(group.responses, group.masks, strict=True)):
            if len(response) <= room:
                continue
            group.responses[k], group.masks[k] = response[:room], mask[:room]
            kept = [token for token, target in zip(response[:room], mask[:room], strict=True) if target]
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            group.bytes[k], group.chars[k] = len(text.encode()), len(text)
        return True

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]


def beginning(tokenizer: Any) -> list[int]:
    """The ids this tokenizer puts before a text by itself (BOS, or nothing)."""
    bare, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:start])


def end_ids(tokenizer: Any) -> set[int]:
    """Ids that may end a turn: end-of-text, and the special tokens whose names say so."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    return {tokenizer.eos_token_id, *(vocabulary[name] for name in names if name in vocabulary)} - {None}


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def as_json(group: Group) -> str:
    """The text-level Group for display and verification."""
    fields = asdict(group)
    return json.dumps({k: fields[k] for k in ("prompt", "responses", "columns")}, ensure_ascii=False, default=str)


def end_of_turn(groups: Iterable[TokenGroup], ends: set[int]) -> int | None:
    """The end token most targets close with, or None."""
    found: Counter[int] = Counter()
    for group in groups:
        for response, mask in zip(group.responses, group.masks, strict=True):
            trained = [token for token, target in zip(response, mask, strict=True) if target and token in ends]
            found.update(trained[-1:])
    return found.most_common(1)[0][0] if found else None
