"""Group → TokenGroup: template, targets by construction, length policy, and a count of everything dropped or cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice
from typing import Any

from posttrain.data.conversations import Encoded, Example, as_json, examples
from posttrain.data.documents import Documents
from posttrain.data.encoding import Counts, Encoding
from posttrain.data.group import Group
from posttrain.data.lengths import fits
from posttrain.data.specials import beginning, end_ids, end_of_turn, endless, special_pattern, template_facts
from posttrain.data.split import without_occurrence
from posttrain.data.template import Template
from posttrain.data.tokenizer_thread import Ids, TokenizerThread, in_parts, one_ahead
from posttrain.data.tokens import TokenGroup
from posttrain.errors import DataError, ModelError

__all__ = ["Counts", "Encoding", "Tokenizer", "beginning", "end_ids", "end_of_turn"]

BATCH = 128
"""Groups rendered at a time: while Python renders these, the tokenizer, which needs no interpreter, is at those before."""
NO_TEMPLATE = (
    "the data holds messages, and there is no chat template to render them; set model.chat_template to a Jinja file, or use a "
    "model whose tokenizer has one"
)


class Tokenizer:
    """Turns Groups into TokenGroups in batches; `counts` fills up as they pass."""

    def __init__(self, tokenizer: Any, encoding: Encoding, on_bad_row: str = "error") -> None:
        if encoding.template == "chat" and not tokenizer.chat_template:
            raise ModelError("data.template=chat, but the tokenizer has no chat template; set model.chat_template")
        self.tokenizer, self.encoding, self.on_bad_row = tokenizer, encoding, on_bad_row
        self.counts = Counts()
        self.seen: Counter[str] = Counter()
        self.bos, self.eos = beginning(tokenizer), tokenizer.eos_token_id
        self.opening = "".join(tokenizer.convert_ids_to_tokens(self.bos))
        self.specials = special_pattern(tokenizer)
        self.ends = end_ids(tokenizer)
        self.documents = Documents(tokenizer, self.bos, self.eos, encoding)
        self.facts = template_facts(tokenizer) if encoding.template == "chat" else []
        self.template = Template(tokenizer, encoding.train_on, self.counts.say)

    def groups(self, groups: Iterable[Group]) -> Iterator[TokenGroup]:
        """TokenGroups in the order of the Groups, without those that are dropped."""
        ends = self.ends | {self.eos}
        thread = self.thread = TokenizerThread(self.tokenizer)
        try:
            for token_groups in one_ahead(map(self._encode, in_parts(iter(groups), BATCH))):
                for token_group in token_groups:
                    if fits(token_group, self.encoding, self.counts, self.tokenizer, ends):
                        self.counts.kept += 1
                        yield token_group
        finally:
            thread.close()

    def stream(self, blocks: Iterable[str], file: str) -> Iterator[TokenGroup]:
        """Windows of one endless document."""
        rest = iter(blocks)
        windows = self.documents.stream(chain((self._bare(block) for block in islice(rest, 1)), rest))
        for number, window in enumerate(windows):
            if not number:
                self._check_opening(window.ids)
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
        """Renders at once, has the texts tokenised from then on, and makes TokenGroups of them as they are taken."""
        self.counts.groups += len(groups)
        if all(group.prompt is None and group.responses and isinstance(group.responses[0], str) for group in groups):
            return self._documents(groups)
        if not any(group.responses for group in groups):
            return self._prompts(groups)
        return self._conversations(groups) if self.encoding.template == "chat" else self._plain(groups)

    def _documents(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        texts = [self._bare(str(group.responses[0])) for group in groups]
        for group, windows in zip(groups, self.documents.split(texts), strict=True):
            try:
                self._check_opening(windows[0].ids if windows else [])
            except DataError as error:
                self._refuse(group, error)
                continue
            self.counts.nothing_trained += not windows
            self.counts.windows += len(windows) if len(windows) > 1 else 0
            name = self._name(group)
            for window in windows:
                yield window.token_group(name)

    def _prompts(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        """Prompts that are yet to be answered, each up to where its answer begins."""
        chat = self.encoding.template == "chat"
        if not chat and any(not isinstance(group.prompt, str) for group in groups):
            raise ModelError(NO_TEMPLATE)
        texts = []
        for group in groups:
            try:
                texts.append(self._asked(group) if chat else self._bare(str(group.prompt)))
            except DataError as error:
                self._refuse(group, error)
                texts.append("")
        return self._asking(groups, texts, self.thread.ids(texts))

    def _asking(self, groups: Sequence[Group], texts: list[str], tokenised: Future[Ids]) -> Iterator[TokenGroup]:
        chat = self.encoding.template == "chat"
        for group, text, ids in zip(groups, texts, tokenised.result(), strict=True):
            if text:
                encoded = Encoded(ids if chat else self.bos + ids, [], [], [])
                yield self._token_group(group, encoded, self._name(group))

    def _asked(self, group: Group) -> str:
        tools: Any = group.columns.get("tools")
        return self.template.prompt(group.prompt or "", tools)

    def _plain(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        """Prompt and completion tokenised apart and concatenated, end-of-text appended."""
        texts = [text for group in groups for text in (group.prompt, *group.responses)]
        if any(text is not None and not isinstance(text, str) for text in texts):
            raise ModelError(NO_TEMPLATE)
        prompts = self.thread.ids([self._bare(str(group.prompt or "")) for group in groups])
        responses = self.thread.ids([str(text) for group in groups for text in group.responses])
        return self._joined(groups, prompts, responses)

    def _joined(self, groups: Sequence[Group], asked: Future[Ids], answered: Future[Ids]) -> Iterator[TokenGroup]:
        answers = iter(answered.result())
        for group, prompt in zip(groups, asked.result(), strict=True):
            responses = [self._ended(next(answers)) for _ in group.responses]
            masks = [[True] * len(response) for response in responses]
            encoded = Encoded(self.bos + prompt, responses, masks, [str(text) for text in group.responses])
            try:
                self._check_opening(encoded.prompt + responses[0])
            except DataError as error:
                self._refuse(group, error)
                continue
            yield self._token_group(group, encoded, self._name(group))

    def _conversations(self, groups: Sequence[Group]) -> Iterator[TokenGroup]:
        self.counts.facts = self.facts
        rendered = [(group, self._examples(group)) for group in groups]
        texts = list(dict.fromkeys(text for _, parts in rendered for part in parts for text in part.texts()))
        return self._masked(rendered, texts, self.thread.ids(texts))

    def _masked(
        self, rendered: list[tuple[Group, list[Example]]], texts: list[str], tokenised: Future[Ids]
    ) -> Iterator[TokenGroup]:
        ids = dict(zip(texts, tokenised.result(), strict=True))
        for group, parts in rendered:
            try:
                encoded = [part.encode(ids, self.ends) for part in parts]
                for each in encoded:
                    self._check_opening(each.prompt + each.responses[0][:2])
            except DataError as error:
                self._refuse(group, error)
                continue
            yield from self._named(group, parts, encoded)

    def _named(self, group: Group, parts: Sequence[Example], encoded: Sequence[Encoded]) -> Iterator[TokenGroup]:
        """An example takes its Group's name; several get the suffixes .0, .1, ... and share the cluster."""
        name = self._name(group) if parts else ""
        if len(parts) > 1:
            self.counts.split += 1
            self.counts.split_into += len(parts)
            self.counts.groups += len(parts) - 1
        for number, (part, each) in enumerate(zip(parts, encoded, strict=True)):
            if not each.ended:
                self.counts.no_end_of_turn += 1
                self.counts.note("no_end_of_turn", endless(self.tokenizer))
            token_group = self._token_group(part.group, each, name)
            if len(parts) > 1:
                token_group.id = f"{name}.{number}"
            yield token_group

    def _examples(self, group: Group) -> list[Example]:
        try:
            return examples(self.template, group)
        except DataError as error:
            self._refuse(group, error)
            return []

    def _refuse(self, group: Group, error: DataError) -> None:
        message = f"{group.file}, row {group.row}: {error}"
        if self.on_bad_row == "error":
            raise DataError(message + "; data.on_bad_row=skip counts and lists such rows instead") from error
        self.counts.unrenderable += 1
        self.counts.note("unrenderable", message)

    def _token_group(self, group: Group, encoded: Encoded, name: str) -> TokenGroup:
        prompt, responses, masks, targets = encoded.prompt, encoded.responses, encoded.masks, encoded.targets
        if self.encoding.prompt_is_target:
            whole = prompt + responses[0]
            prompt, responses, masks = whole[:1], [whole[1:]], [[True] * (len(whole) - 1)]
            targets = [self.tokenizer.decode(whole[1:], skip_special_tokens=True)]
        plain = [self.specials.sub("", target) if self.specials else target for target in targets]
        return TokenGroup(
            id=name,
            cluster=without_occurrence(name),
            prompt=prompt,
            responses=responses,
            masks=masks,
            bytes=[len(text.encode()) for text in plain],
            chars=[len(text) for text in plain],
            text=as_json(group),
            rewards=list(group.rewards or ()),
            ranks=list(group.ranks or ()),
            target_probs=list(group.target_probs or ()),
            sampler_logprobs=list(group.sampler_logprobs or ()),
            margin=group.margin,
        )

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]

    def _bare(self, text: str) -> str:
        """Without the beginning-of-text that some files write out: the tokenizer's own is put before it."""
        return text.removeprefix(self.opening)

    def _check_opening(self, ids: list[int]) -> None:
        """At most one beginning-of-text: ours or the template's, and none of the data's own beside it."""
        begin = self.tokenizer.bos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            raise DataError(f"begins with {self.tokenizer.bos_token} twice; remove it from the data")
