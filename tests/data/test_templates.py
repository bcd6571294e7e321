"""Real chat templates and the targets they give, written out by hand: what stands between ⟦ and ⟧ is trained.

The files in templates/ are written from public knowledge of the models' own; they render the same text.
"""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.data.group import Group, Message
from posttrain.data.specials import end_ids, end_of_turn
from posttrain.data.tokenize import Encoding, Tokenizer
from posttrain.errors import DataError

FOLDER = Path(__file__).parent / "templates"
TOKENS = {  # beginning-of-text, end-of-text, other tokens of the template's own
    "chatml": (None, "<|im_end|>", "<|im_start|>"),
    "llama2": ("<s>", "</s>", ""),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|> <|end_header_id|>"),
    "mistral": ("<s>", "</s>", "[INST] [/INST]"),
    "mistral_nemo": ("<s>", "</s>", "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn> <end_of_turn>"),
    "qwen2_5": (None, "<|im_end|>", "<|im_start|> <|endoftext|>"),
    "qwen3": (None, "<|im_end|>", "<|im_start|> <|endoftext|>"),
    "phi3_5": (None, "<|endoftext|>", "<|user|> <|assistant|> <|system|> <|end|>"),
    "zephyr": ("<s>", "</s>", ""),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜> <｜Assistant｜>"),
    "command_r": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
    ),
    "glm4": (None, "<|endoftext|>", "[gMASK] <sop> <|user|> <|assistant|>"),
}
U, A, S, T = (
    lambda text, role=role, **more: Message(role, text, **more) for role in ("user", "assistant", "system", "tool")
)
TALK = (U("hi"), A("yo"), U("more"), A("ok"))
SYSTEM_TALK = (S("be kind"), *TALK)
ADD = {"type": "function", "function": {"name": "add"}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL_TALK = (U("1+2?"), A("", extra={"tool_calls": [CALL]}), T("3", extra={"tool_call_id": "abcdefghi"}), A("It is 3."))


def load(name: str, *changes: tuple[str, str]) -> Any:
    """One token a byte and the template's own tokens; it puts a beginning-of-text before plain texts, if it has one."""
    bos, eos, others = TOKENS[name]
    words = [word for word in (bos, eos, *others.split()) if word]
    vocabulary = {token: i for i, token in enumerate([*words, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=others.split()
    )
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer: Any, *talks: tuple[Message, ...], tools: Any = None, on_bad_row: str = "error", **options: Any):
    groups = [
        Group(talk[:-1], (talk[-1:],), columns={"tools": tools} if tools else {}, file="f.jsonl", row=row)
        for row, talk in enumerate(talks, 1)
    ]
    worker = Tokenizer(tokenizer, Encoding("chat", 10_000, "drop", **options), on_bad_row)
    return list(worker.groups(groups)), worker


def marked(tokenizer: Any, group: Any) -> str:
    """The example as text, its targets between ⟦ and ⟧."""
    ids, mask = group.prompt + group.responses[0], [False] * len(group.prompt) + group.masks[0]
    text, start = "", 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or mask[stop] != mask[start]:
            piece = tokenizer.decode(ids[start:stop])
            text, start = text + (f"⟦{piece}⟧" if mask[start] else piece), stop
    return text


def rendered(tokenizer: Any, *talks: tuple[Message, ...], **options: Any) -> list[str]:
    return [marked(tokenizer, group) for group in encode(tokenizer, *talks, **options)[0]]


LLAMA3_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
COMMAND_USER, COMMAND_BOT = (f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>" for role in ("USER", "CHATBOT"))

ALL_TURNS = {
    "chatml": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "⟦yo<|im_end|>\n⟧<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>\n⟧",
    "llama2": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST]⟦ yo </s>⟧<s>[INST] more [/INST]⟦ ok </s>⟧",
    "llama3": LLAMA3_SYSTEM + "be kind<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nmore"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦ok<|eot_id|>⟧",
    "mistral": "<s>[INST] hi [/INST]⟦yo</s>⟧[INST] more [/INST]⟦ok</s>⟧",
    "mistral_nemo": "<s>[INST]hi[/INST]⟦yo</s>⟧[INST]more[/INST]⟦ok</s>⟧",
    "gemma": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦yo<end_of_turn>\n⟧<start_of_turn>user\n"
    "more<end_of_turn>\n<start_of_turn>model\n⟦ok<end_of_turn>\n⟧",
    "qwen2_5": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "⟦yo<|im_end|>\n⟧<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>\n⟧",
    "phi3_5": "<|system|>\nbe kind<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n⟦yo<|end|>\n⟧<|user|>\nmore<|end|>\n"
    "<|assistant|>\n⟦ok<|end|>\n<|endoftext|>⟧",
    "zephyr": "<|system|>\nbe kind</s>\n<|user|>\nhi</s>\n<|assistant|>\n⟦yo</s>\n⟧<|user|>\nmore</s>\n<|assistant|>\n"
    "⟦ok</s>\n⟧",
    "deepseek_r1": "<｜begin▁of▁sentence｜>be kind<｜User｜>hi<｜Assistant｜>⟦yo<｜end▁of▁sentence｜>⟧<｜User｜>more"
    "<｜Assistant｜>⟦ok<｜end▁of▁sentence｜>⟧",
    "command_r": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>be kind<|END_OF_TURN_TOKEN|>"
    f"{COMMAND_USER}hi<|END_OF_TURN_TOKEN|>{COMMAND_BOT}⟦yo<|END_OF_TURN_TOKEN|>⟧"
    f"{COMMAND_USER}more<|END_OF_TURN_TOKEN|>{COMMAND_BOT}⟦ok<|END_OF_TURN_TOKEN|>⟧",
    "glm4": "[gMASK]<sop><|system|>\nbe kind<|user|>\nhi<|assistant|>⟦\nyo⟧<|user|>\nmore<|assistant|>⟦\nok⟧",
}
NO_SYSTEM = ("mistral", "mistral_nemo", "gemma")


@pytest.mark.parametrize("name", ALL_TURNS)
def test_every_answer_and_nothing_else_is_trained(name: str) -> None:
    tokenizer, talk = load(name), TALK if name in NO_SYSTEM else SYSTEM_TALK
    assert rendered(tokenizer, talk) == [ALL_TURNS[name]]
    last_only = ALL_TURNS[name].replace("⟦", "", 1).replace("⟧", "", 1)
    assert rendered(tokenizer, talk, train_on="last") == [last_only]
    kept_out = (*talk[:-3], A(talk[-3].content, train=False), *talk[-2:])
    assert rendered(tokenizer, kept_out) == [last_only]


END_OF_TURN = {
    "chatml": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>", "mistral_nemo": "</s>",
    "gemma": "<end_of_turn>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "phi3_5": "<|end|>", "zephyr": "</s>",
    "deepseek_r1": "<｜end▁of▁sentence｜>", "command_r": "<|END_OF_TURN_TOKEN|>",
}  # fmt: skip


@pytest.mark.parametrize("name", END_OF_TURN)
def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(name: str) -> None:
    tokenizer = load(name)
    groups, worker = encode(tokenizer, TALK, TALK[:2])
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[name])
    assert end_ids(tokenizer) == {end, tokenizer.eos_token_id}
    assert end_of_turn(groups, end_ids(tokenizer)) == end
    assert worker.counts.no_end_of_turn == 0
    told = any(f"answers end with {END_OF_TURN[name]}" in line for line in worker.counts.lines(worker.encoding))
    assert told == (end != tokenizer.eos_token_id)


@pytest.mark.parametrize("written", ["", "<|stop|>"])
def test_an_answer_that_nothing_ends_is_told_with_the_fix(written: str) -> None:
    tokenizer = load("glm4", ("message['content'] }}", f"message['content'] + '{written}' }}}}"))
    _, worker = encode(tokenizer, TALK, TALK[:2])
    assert worker.counts.no_end_of_turn == 2
    first, why = worker.counts.lines(worker.encoding)[:2]
    assert first.startswith("2 train no end-of-turn token")
    assert f"writes {repr(written) if written else 'nothing'} after an answer" in why
    assert "end the assistant's turn with <|endoftext|> in model.chat_template" in why


QWEN3 = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


class TestThinking:
    think = A("<think>\nhm\n</think>\n\nyo")

    def test_an_answer_shown_without_its_thinking_later_is_an_example_of_its_own(self) -> None:
        tokenizer = load("qwen3")
        groups, worker = encode(tokenizer, (U("hi"), self.think, U("more"), A("<think>\nso\n</think>\n\nok")))
        assert [marked(tokenizer, group) for group in groups] == [
            QWEN3 + "⟦<think>\nhm\n</think>\n\nyo<|im_end|>\n⟧",
            QWEN3 + "yo<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nso\n</think>\n\nok<|im_end|>\n⟧",
        ]
        name = groups[0].cluster
        assert [(g.id, g.cluster) for g in groups] == [(f"{name}.0", name), (f"{name}.1", name)]
        assert ['"more"' in group.text for group in groups] == [False, True]
        (line,) = worker.counts.lines(worker.encoding)
        assert line.startswith("1 conversations made into 2 examples: the chat template shows an answer differently")
        assert (worker.counts.groups, worker.counts.kept) == (2, 2)

    def test_the_last_turn_alone_is_one_example_under_the_conversation_s_name(self) -> None:
        tokenizer = load("qwen3")
        talk = (U("hi"), self.think, U("more"), A("ok"))
        (group,), _ = encode(tokenizer, talk, train_on="last")
        assert marked(tokenizer, group) == (
            QWEN3 + "yo<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nok<|im_end|>\n⟧"
        )
        assert group.id == group.cluster == Group(talk[:-1], (talk[-1:],)).content_id()

    def test_answers_that_one_rendering_shows_stay_together(self) -> None:
        tokenizer, given = load("qwen3"), {"reasoning_content": "use the tool"}
        call = A("", extra={**given, "tool_calls": [CALL]})
        talk = (U("1+2?"), call, T("3"), A("It is 3."), U("more"), A("ok"))
        asked = "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
        called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n'
        result = "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        assert rendered(tokenizer, talk) == [
            f"{asked}⟦<think>\nuse the tool\n</think>\n\n{called}⟧{result}⟦<think>\n\n</think>\n\nIt is 3.<|im_end|>\n⟧",
            f"{asked}{called}{result}It is 3.<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nok<|im_end|>\n⟧",
        ]

    def test_a_generation_prompt_that_opens_the_thinking_belongs_to_the_prompt(self) -> None:
        tokenizer = load(
            "qwen3",
            (
                "{{ '<|im_start|>assistant\\n' }}\n{%- endif -%}",
                "{{ '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif -%}",
            ),
        )
        assert rendered(tokenizer, (U("hi"), self.think)) == [QWEN3 + "<think>\n⟦hm\n</think>\n\nyo<|im_end|>\n⟧"]

    def test_thinking_that_the_template_never_shows_is_counted(self) -> None:
        tokenizer = load("deepseek_r1")
        groups, worker = encode(tokenizer, (U("hi"), self.think), (U("hi"), A("yo", extra={"reasoning_content": "hm"})))
        expected = "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>⟦{}yo<｜end▁of▁sentence｜>⟧"
        assert [marked(tokenizer, g) for g in groups] == [expected.format("\n\n"), expected.format("")]
        assert worker.counts.lines(worker.encoding)[0].startswith("2 answers are trained without their thinking")

    def test_a_prompt_that_the_rendered_answer_does_not_begin_with_is_refused(self) -> None:
        opened = load("deepseek_r1", ("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}"))
        told = r"f.jsonl, row 1: message 2 .*the prompt goes on with '<think>\\n', the rendered conversation with '\\n\\nyo"
        with pytest.raises(DataError, match=told):
            encode(opened, (U("hi"), self.think))

    def test_responses_that_are_compared_cannot_be_split(self) -> None:
        group = Group((U("hi"), self.think, U("more")), ((A("ok"),), (A("no"),)), file="f.jsonl", row=3)
        worker = Tokenizer(load("qwen3"), Encoding("chat", 1000, "drop"))
        with pytest.raises(DataError, match=r"row 3: .*responses of one turn"):
            list(worker.groups([group]))


class TestSystem:
    def test_a_template_s_own_system_text_is_given_not_trained(self) -> None:
        asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert rendered(load("qwen2_5"), TALK[:2]) == [QWEN_SYSTEM + asked + "⟦yo<|im_end|>\n⟧"]

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("gemma", "roles .system, user, assistant.: TemplateError: System role not supported"),
            ("mistral", "roles .system, user, assistant.: TemplateError: Conversation roles must alternate"),
            ("mistral_nemo", r"after '<s>\[INST\]' the prompt goes on with 'be kind.*conversation with 'hi"),
        ],
    )
    def test_a_template_that_cannot_show_it_is_refused_with_row_and_reason(self, name: str, why: str) -> None:
        with pytest.raises(DataError, match="f.jsonl, row 2: .*" + why):
            encode(load(name), TALK[:2], (S("be kind"), *TALK[:2]))
        kept, worker = encode(load(name), TALK[:2], (S("be kind"), *TALK[:2]), on_bad_row="skip")
        assert (len(kept), worker.counts.unrenderable, worker.counts.split) == (1, 1, 0)

    @pytest.mark.parametrize("name", ["gemma", "mistral", "llama2", "command_r"])
    def test_turns_that_do_not_alternate_are_refused_where_the_template_demands_it(self, name: str) -> None:
        with pytest.raises(DataError, match=r"f.jsonl, row 1: the chat template refuses .* must alternate"):
            encode(load(name), (U("hi"), U("you"), A("yo")))


def test_contents_are_trained_as_the_template_trims_them() -> None:
    talk = (U(" hi\n"), A("\n yo  "))
    assert rendered(load("gemma"), talk)[0].endswith("user\nhi<end_of_turn>\n<start_of_turn>model\n⟦yo<end_of_turn>\n⟧")
    assert rendered(load("llama3"), talk)[0].endswith("assistant<|end_header_id|>\n\n⟦yo<|eot_id|>⟧")
    assert rendered(load("mistral"), talk) == ["<s>[INST]  hi\n [/INST]⟦\n yo  </s>⟧"]


class TestTools:
    def test_qwen(self) -> None:
        (text,) = rendered(load("qwen2_5"), TOOL_TALK, tools=[ADD])
        assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in text
        assert text.endswith(
            "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
            '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n⟧'
            "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            "⟦It is 3.<|im_end|>\n⟧"
        )

    def test_llama(self) -> None:
        (text,) = rendered(load("llama3"), TOOL_TALK, tools='[{"type": "function", "function": {"name": "add"}}]')
        assert text.endswith(
            '    "function": {\n        "name": "add"\n    }\n}\n\n1+2?<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            '⟦{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>⟧'
            '<|start_header_id|>ipython<|end_header_id|>\n\n"3"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 3.<|eot_id|>⟧"
        )

    def test_mistral_moves_the_tools_to_the_last_question(self) -> None:
        tools = '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "add"}}][/AVAILABLE_TOOLS]'
        call = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]</s>'
        result = '[TOOL_RESULTS]{"content": 3, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
        assert rendered(load("mistral_nemo"), (*TOOL_TALK, U("more"), A("ok")), tools=[ADD]) == [
            f"<s>{tools}[INST]1+2?[/INST]⟦{call}⟧{result}⟦It is 3.</s>⟧",
            f"<s>[INST]1+2?[/INST]{call}{result}It is 3.</s>{tools}[INST]more[/INST]⟦ok</s>⟧",
        ]

    @pytest.mark.parametrize("name", ["phi3_5", "zephyr", "deepseek_r1"])
    def test_what_a_template_leaves_out_is_refused(self, name: str) -> None:
        with pytest.raises(DataError, match="row 1: the chat template leaves out the call of add"):
            encode(load(name), TOOL_TALK)
        with pytest.raises(DataError, match="row 1: the chat template leaves out messages of the role tool"):
            encode(load(name), TOOL_TALK, train_on="last")

    def test_tools_that_the_template_does_not_list_are_told(self) -> None:
        _, worker = encode(load("zephyr"), TALK, TALK[:2], tools=[ADD])
        assert worker.counts.lines(worker.encoding)[0].startswith("2 list tools that the chat template does not show")
        with pytest.raises(DataError, match="row 1: the column tools is no JSON"):
            encode(load("qwen2_5"), TALK, tools="add(a, b)")


class TestRoles:
    def test_a_list_of_roles_trains_their_turns_headers_included(self) -> None:
        start = QWEN_SYSTEM + "<|im_start|>user\n1+2?<|im_end|>\n"
        call = '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n'
        result = "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        answer = "<|im_start|>assistant\n⟦It is 3.<|im_end|>\n⟧"
        assert rendered(load("qwen2_5"), TOOL_TALK, train_on=["tool"]) == [
            f"{start}{call}⟦{result}⟧{answer.replace('⟦', '').replace('⟧', '')}"
        ]
        both = call.replace("assistant\n", "assistant\n⟦", 1)
        assert rendered(load("qwen2_5"), TOOL_TALK, train_on=["assistant", "tool"]) == [
            f"{start}{both}{result}⟧{answer}"
        ]
        assert rendered(load("chatml"), TALK, train_on=["assistant"]) == rendered(load("chatml"), TALK)

    def test_the_first_token_is_always_given(self) -> None:
        assert rendered(load("chatml"), TALK[:2], train_on=["user"]) == [
            "<|im_start|>⟦user\nhi<|im_end|>\n⟧<|im_start|>assistant\nyo<|im_end|>\n"
        ]

    def test_an_end_of_text_that_closes_any_rendering_is_no_part_of_the_next_turn(self) -> None:
        assert rendered(load("phi3_5"), TALK, train_on=["user"]) == [
            "<|user|>⟦\nhi<|end|>\n⟧<|assistant|>\nyo<|end|>\n⟦<|user|>\nmore<|end|>\n⟧<|assistant|>\nok<|end|>\n<|endoftext|>"
        ]

    def test_a_message_s_own_flag_decides_whatever_its_role(self) -> None:
        talk = (U("hi"), A("yo"), U("more", train=True), A("ok", train=False))
        assert rendered(load("mistral"), talk, train_on="last") == [
            "<s>[INST] hi [/INST]yo</s>⟦[INST] more [/INST]⟧ok</s>"
        ]
        kept, worker = encode(load("mistral"), (U("hi"), A("yo", train=False)))
        assert (kept, worker.counts.nothing_trained) == ([], 1)


class TestBeginning:
    @pytest.mark.parametrize("name", [name for name, (bos, *_) in TOKENS.items() if bos and name != "zephyr"])
    def test_it_is_written_once_by_the_template_and_added_by_nobody(self, name: str) -> None:
        tokenizer = load(name)
        (group,), worker = encode(tokenizer, TALK[:2])
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == group.prompt[0]
        assert (group.prompt + group.responses[0]).count(tokenizer.bos_token_id) == 1
        assert not any("begin without" in line for line in worker.counts.lines(worker.encoding))

    def test_a_template_that_writes_none_is_told(self) -> None:
        tokenizer = load("zephyr")
        (group,), worker = encode(tokenizer, TALK[:2])
        assert tokenizer.decode(group.prompt) == "<|user|>\nhi</s>\n<|assistant|>\n"
        (line,) = worker.counts.lines(worker.encoding)
        assert line == "conversations begin without <s>: the chat template writes none, though the tokenizer would"

    def test_a_second_one_from_the_data_is_refused(self) -> None:
        bare = load("mistral", ("'[INST] ' + message['content'] + ' [/INST]'", "message['content']"))
        with pytest.raises(DataError, match="row 2: begins with <s> twice"):
            encode(bare, (U("hi"), A("yo")), (U("<s>hi"), A("yo")))

    @pytest.mark.parametrize("prompt", [None, "ask"])
    def test_without_a_template_a_written_one_is_not_doubled(self, prompt: str | None) -> None:
        tokenizer = load("mistral")
        texts = ["hi", "<s>hi", "<s><s>hi"]
        groups = [
            Group(text if prompt else None, ("yo" if prompt else text,), file="f.txt", row=n)
            for n, text in enumerate(texts, 1)
        ]
        worker = Tokenizer(tokenizer, Encoding("none", 100, "drop", prompt_is_target=not prompt), "skip")
        told = [tokenizer.decode(g.prompt + g.responses[0]) for g in worker.groups(groups)]
        assert told == ["<s>hiyo</s>" if prompt else "<s>hi</s>"] * 2
        assert worker.counts.examples["unrenderable"] == [
            "f.txt, row 3: begins with <s> twice; remove it from the data"
        ]

    def test_nor_in_a_stream(self) -> None:
        tokenizer = load("mistral")
        worker = Tokenizer(tokenizer, Encoding("none", 100, "split", prompt_is_target=True))
        (window,) = worker.stream(["<s>hi", "<s>yo"], "f.txt")
        assert tokenizer.decode(window.prompt + window.responses[0]) == "<s>hi<s>yo</s>"


def test_a_template_that_writes_the_date_is_told() -> None:
    _, worker = encode(
        load("llama3", ("Today Date: 26 Jul 2024", "Today Date: ' + strftime_now('%d %b %Y') + '")), TALK
    )
    assert any("day's date" in line for line in worker.counts.lines(worker.encoding))


@pytest.mark.real
def test_a_real_tokenizer(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    asked = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    later = "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    (group,), worker = encode(tokenizer, SYSTEM_TALK)
    assert marked(tokenizer, group) == f"{asked}⟦yo<|im_end|>\n⟧{later}⟦ok<|im_end|>\n⟧"
    assert worker.counts.lines(worker.encoding) == []
