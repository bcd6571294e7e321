"""Templates, masks by construction, length policy. Expected masks are written out by hand for small real templates."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data.group import Group, Message
from posttrain.data.tokenize import BATCH, Encoding, Tokenizer, beginning
from posttrain.errors import DataError, ModelError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
DROPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEEDS_PREFILL = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")


def make_tokenizer(template: str | None = None, bos: bool = False) -> Any:
    """Byte-level without merges: one token a byte, and the special tokens of the templates above."""
    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=specials[:2]
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(groups: list[Group], tokenizer: Any, **options: Any) -> tuple[list[Any], Tokenizer]:
    options = {"template": "chat", "max_length": 1000, "on_too_long": "drop"} | options
    on_bad_row = options.pop("on_bad_row", "error")
    worker = Tokenizer(tokenizer, Encoding(**options), on_bad_row)
    return list(worker.groups(groups)), worker


def targets(token_group: Any, tokenizer: Any) -> str:
    """Trained text, runs of it between bars."""
    pieces, ids, mask = [], token_group.responses[0], token_group.masks[0]
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            if mask[start]:
                pieces.append(tokenizer.decode(ids[start:stop]))
            start = stop
    return "|".join(pieces)


U, A, S = (lambda text, role=role, **more: Message(role, text, **more) for role in ("user", "assistant", "system"))
TWO_TURNS = Group((U("hi"), A("yo"), U("more")), ((A("ok"),),))


def test_everything_after_the_generation_prompt_is_trained() -> None:
    tokenizer = make_tokenizer(CHATML)
    (group,), _ = encode([Group("hi", ("yo",))], tokenizer)
    assert tokenizer.decode(group.prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(group.responses[0]) == "yo<|im_end|>\n"
    assert group.masks == [[True] * 4]  # y, o, end of turn, newline
    assert (group.bytes, group.chars) == ([3], [3])  # the end-of-turn token has no bytes, the newline has one


@pytest.mark.parametrize(
    ("template", "train_on", "expected"),
    [
        (CHATML, "all", "yo<|im_end|>\n|ok<|im_end|>\n"),
        (CHATML, "last", "ok<|im_end|>\n"),
        (LLAMA2, "all", " yo </s>| ok </s>"),
        (LLAMA2, "last", " ok </s>"),
        (DROPS_THINKING, "last", "ok<|im_end|>\n"),
        (DROPS_THINKING, "all", "yo<|im_end|>\n|ok<|im_end|>\n"),  # no thinking, nothing dropped
    ],
)
def test_turns_that_are_trained(template: str, train_on: str, expected: str) -> None:
    tokenizer = make_tokenizer(template)
    (group,), _ = encode([TWO_TURNS], tokenizer, train_on=train_on)
    assert targets(group, tokenizer) == expected
    whole = tokenizer.decode(group.prompt + group.responses[0])
    assert whole == tokenizer.apply_chat_template(
        [
            {"role": r, "content": c}
            for r, c in (("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "ok"))
        ],
        tokenize=False,
    )


def test_a_message_can_be_kept_out_of_training() -> None:
    tokenizer = make_tokenizer(CHATML)
    group = Group((U("hi"), A("yo", train=False), U("more")), ((A("ok"),),))
    (encoded,), _ = encode([group], tokenizer)
    assert targets(encoded, tokenizer) == "ok<|im_end|>\n"


def test_bos_is_there_once() -> None:
    tokenizer = make_tokenizer(LLAMA2, bos=True)
    (group,), _ = encode([Group("hi", ("yo",))], tokenizer)
    assert group.prompt.count(tokenizer.bos_token_id) == 1
    plain = make_tokenizer(bos=True)
    groups, _ = encode([Group("hi", ("yo",)), Group("<s>hi", ("yo",))], plain, template="none")
    assert [plain.decode(group.prompt) for group in groups] == ["<s>hi", "<s>hi"]
    assert beginning(plain) == [plain.bos_token_id]
    assert beginning(make_tokenizer()) == []


def test_without_a_template_the_parts_are_tokenised_apart_and_ended() -> None:
    tokenizer = make_tokenizer()
    (group,), _ = encode([Group("1+1=", ("2",))], tokenizer, template="none")
    assert tokenizer.decode(group.prompt) == "1+1="
    assert group.responses[0][-1] == tokenizer.eos_token_id
    assert (group.masks, group.bytes) == ([[True, True]], [1])


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        encode([TWO_TURNS], make_tokenizer(), template="none")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        encode([TWO_TURNS], make_tokenizer(), template="chat")


def test_a_template_that_is_not_prefix_stable_is_refused_by_row() -> None:
    tokenizer = make_tokenizer(NEEDS_PREFILL)
    group = Group((U("hi"), A("<think>x</think>yo"), U("more")), ((A("ok"),),), file="f.jsonl", row=7)
    with pytest.raises(DataError, match=r"f.jsonl, row 7: message 4 .* goes on with '<think>', .* with 'ok<"):
        encode([group], tokenizer)
    kept, worker = encode([group], tokenizer, on_bad_row="skip")
    assert (kept, worker.counts.unrenderable) == ([], 1)
    assert "row 7" in worker.counts.examples["unrenderable"][0]


def test_an_answer_that_changes_once_the_conversation_goes_on_is_an_example_of_its_own() -> None:
    tokenizer = make_tokenizer(DROPS_THINKING)
    group = Group((U("hi"), A("<think>x</think>yo"), U("more")), ((A("ok"),),))
    kept, worker = encode([group, group], tokenizer)
    assert [targets(g, tokenizer) for g in kept] == ["<think>x</think>yo<|im_end|>\n", "ok<|im_end|>\n"] * 2
    name = group.content_id()
    assert [g.id for g in kept] == [f"{name}.0", f"{name}.1", f"{name}-2.0", f"{name}-2.1"]
    assert {g.cluster for g in kept} == {name}, "a copy is no observation of its own"
    assert (worker.counts.split, worker.counts.split_into, worker.counts.groups) == (2, 4, 4)
    shorter, worker = encode([group], tokenizer, max_length=50)
    assert ([g.id for g in shorter], worker.counts.too_long) == ([f"{name}.0"], 1)


def test_a_token_across_the_border_of_prompt_and_answer_is_refused() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    merged = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    merged.chat_template = tokenizer.chat_template
    with pytest.raises(DataError, match="not a prefix of the tokenised whole"):
        encode([Group("a", ("b",))], merged)


def test_long_examples_are_dropped_cut_or_refused_and_counted() -> None:
    tokenizer = make_tokenizer()
    groups = [Group("abc", ("defgh",)), Group("a", ("b",)), Group("abcdef", ("g",))]
    kept, worker = encode(groups, tokenizer, template="none", max_length=6)
    assert ([g.id for g in kept], worker.counts.too_long) == ([groups[1].content_id()], 2)
    kept, worker = encode(groups, tokenizer, template="none", max_length=6, on_too_long="truncate")
    assert [tokenizer.decode(g.responses[0]) for g in kept] == ["def", "b</s>"]
    assert (kept[0].bytes, worker.counts.truncated, worker.counts.cut_tokens) == ([3], 1, 3)
    assert worker.counts.too_long == 1  # its prompt alone fills the row: cutting would leave nothing to train on
    with pytest.raises(DataError, match=r"data\.max_length=6"):
        encode(groups, tokenizer, template="none", max_length=6, on_too_long="error")


def test_repeats_are_kept_under_names_of_their_own() -> None:
    kept, worker = encode([Group("a", ("b",))] * 3, make_tokenizer(), template="none")
    name = Group("a", ("b",)).content_id()
    assert [g.id for g in kept] == [name, f"{name}-2", f"{name}-3"]
    assert worker.counts.duplicates == 2


def test_pretraining_targets_everything_but_the_first_token() -> None:
    tokenizer = make_tokenizer()
    (group,), _ = encode([Group("ab", ("c",))], tokenizer, template="none", prompt_is_target=True, on_too_long="split")
    assert (tokenizer.decode(group.prompt), tokenizer.decode(group.responses[0])) == ("a", "bc</s>")


class TestDocuments:
    def windows(
        self, text: str, max_length: int, bos: bool = False, stream: int | None = None
    ) -> tuple[list[Any], Any]:
        tokenizer = make_tokenizer(bos=bos)
        worker = Tokenizer(tokenizer, Encoding("none", max_length, "split", prompt_is_target=True))
        if stream:
            blocks = [text[i : i + stream] for i in range(0, len(text), stream)]
            return list(worker.stream(blocks, "f.txt")), tokenizer
        return list(worker.groups([Group(None, (text,))])), tokenizer

    @pytest.mark.parametrize("make", [lambda t, m: (t, m, False), lambda t, m: (t, m, True)])
    @pytest.mark.parametrize("max_length", [2, 3, 5, 7, 100])
    @pytest.mark.parametrize("stream", [None, 4, 1000])
    def test_every_token_is_predicted_exactly_once(
        self, make: Callable[..., Any], max_length: int, stream: int | None
    ) -> None:
        text = "näive café 12345 ümlaut"
        windows, tokenizer = self.windows(*make(text, max_length), stream=stream)
        first = windows[0].prompt
        predicted = [token for window in windows for token in window.responses[0]]
        assert tokenizer.decode(first + predicted) == ("<s>" if len(first) and first[0] == 2 else "") + text + "</s>"
        assert all(len(w.prompt) == 1 and max(w.lengths) <= max_length for w in windows)
        assert all(a.responses[0][-1] == b.prompt[0] for a, b in pairwise(windows))

    @pytest.mark.parametrize("stream", [None, 4])
    def test_bytes_and_characters_are_those_of_the_predicted_text(self, stream: int | None) -> None:
        text = "a\nnäive café"
        windows, _ = self.windows(text, 4, stream=stream)
        assert sum(w.bytes[0] for w in windows) == len(text.encode()) - 1  # all but the given first letter
        with_bos, _ = self.windows(text, 4, bos=True, stream=stream)
        assert sum(w.bytes[0] for w in with_bos) == len(text.encode())
        assert sum(w.chars[0] for w in with_bos) == len(text)

    def test_windows_of_a_document_share_its_cluster_and_those_of_a_stream_do_not(self) -> None:
        windows, _ = self.windows("abcdefgh", 4)
        assert len({w.cluster for w in windows}) == 1
        assert [w.id for w in windows] == [f"{windows[0].cluster}.{i}" for i in range(len(windows))]
        windows, _ = self.windows("abcdefgh", 4, stream=100)
        assert len({w.cluster for w in windows}) == len(windows) > 1


def test_a_tokenizers_own_cutting_and_padding_are_set_aside() -> None:
    tokenizer = make_tokenizer(CHATML)
    whole, _ = encode([TWO_TURNS], tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=200)
    cut, _ = encode([TWO_TURNS], tokenizer)
    assert cut == whole


def test_a_tokenizer_written_in_python_gives_the_same() -> None:
    class Slow:
        """The same tokenizer behind the interface that all of transformers' share."""

        is_fast = False

        def __init__(self, fast: Any) -> None:
            self.fast = fast

        def __getattr__(self, name: str) -> Any:
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self.fast, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.fast(*args, **options)

    tokenizer = make_tokenizer(CHATML)
    assert encode([TWO_TURNS], Slow(tokenizer))[0] == encode([TWO_TURNS], tokenizer)[0]


def test_many_parts_keep_their_order_and_are_all_counted() -> None:
    groups = [Group(f"{number}+0=", (str(number),)) for number in range(2 * BATCH + 3)]
    for template in ("chat", "none"):
        found, worker = encode(groups, make_tokenizer(CHATML), template=template)
        assert [json.loads(each.text)["prompt"] for each in found] == [group.prompt for group in groups]
        assert (worker.counts.groups, worker.counts.kept) == (len(groups), len(groups))


def test_an_unrenderable_row_in_a_later_part_is_named() -> None:
    good, bad = Group((U("hi"),), ((A("yo"),),)), Group((U("hi"), Message("tool", "4")), ((A("yo"),),), file="f", row=9)
    template = CHATML.replace(
        "{{ '<|im_start|>'", "{% if m['role'] == 'tool' %}{{ 1 / 0 }}{% endif %}{{ '<|im_start|>'", 1
    )
    with pytest.raises(DataError, match="f, row 9: the chat template refuses"):
        encode([good] * (BATCH + 5) + [bad], make_tokenizer(template))


def test_two_readings_at_once_do_not_end_each_other() -> None:
    groups = [Group(f"{number}+0=", (str(number),)) for number in range(2 * BATCH)]
    worker = Tokenizer(make_tokenizer(), Encoding("none", 1000, "drop"))
    first, second = worker.groups(groups), worker.groups(groups)
    next(first), next(second)
    first.close()
    assert len(list(second)) == 2 * BATCH - 1
