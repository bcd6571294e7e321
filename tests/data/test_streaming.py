"""Streamed data: every example once an epoch whatever the ranks, gone back to at any place, in memory that does not grow."""

import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_but

from posttrain.config import resolve
from posttrain.data.loader import Step
from posttrain.data.packing import Packing
from posttrain.data.pipeline import Prepared, prepare
from posttrain.data.streaming import readers
from posttrain.data.streaming.prepare import prepare_stream
from posttrain.data.streaming.stream import Stream, StreamLoader
from posttrain.data.text import placed_blocks, text_blocks
from posttrain.data.token_dataset import TokenDataset
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.models.load import load_tokenizer

TEXTS = [f"{n}+{n}={2 * n}" for n in range(300)]
PACKING = Packing("padded", 512)


def write(path: str, texts: list[str]) -> None:
    """The texts as rows of a file of this kind, several row groups in a .parquet."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if path.endswith(".parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=64)
    elif path.endswith(".csv"):
        Path(path).write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif path.endswith(".gz"):
        Path(path).write_bytes(gzip.compress(lines.encode()))
    elif path.endswith(".txt"):
        Path(path).write_text("\n".join(texts))
    else:
        Path(path).write_text(lines)


@cache
def options(*overrides: str) -> Any:
    given = ["stage=pretrain", "model.path=embedded", "data.max_length=32", "data.streaming=true", "train.steps=5"]
    return resolve([*given, "data.eval_fraction=0.2", "data.shuffle_buffer=50", *overrides], "plan")


def prepared(*overrides: str) -> Prepared:
    cfg = options(*overrides)
    return prepare_stream(cfg.data, _tokenizer(), cfg.stage, cfg.train.seed)


def stream(*overrides: str) -> Stream:
    found = prepared(*overrides).stream
    assert found is not None
    return found


def text_of(group: Any) -> str:
    """All its tokens, the given first one too, as text."""
    return str(_tokenizer().decode(group.prompt + group.responses[0], skip_special_tokens=True))


@cache
def _tokenizer() -> Any:
    return load_tokenizer(options("data.train=a.jsonl").model)


def take(source: Stream, count: int) -> list[str]:
    return [text_of(source.next()) for _ in range(count)]


def one_epoch(source: Stream) -> list[str]:
    """The texts of the first epoch: blocks end where it does."""
    found = []
    while source.feeds[0].epoch == 0:
        found += take(source, 1)
        found += take(source, len(source.examples) - source.used)
    return found


class TestAnEpoch:
    def test_holds_each_example_once_and_none_that_is_held_out(self) -> None:
        write("a.jsonl", TEXTS)
        made = prepared("data.train=a.jsonl", "data.eval_limit=7")
        assert made.stream is not None
        held = [text_of(group) for group in made.eval.groups(range(len(made.eval)))]
        assert len(held) == 7
        seen = one_epoch(made.stream)
        assert len(seen) == len(set(seen))
        assert not set(seen) & set(held)
        left_out = set(TEXTS) - set(seen)
        assert set(held) <= left_out
        assert held == [text for text in TEXTS if text in left_out][:7], "the first of them, in the file's order"
        assert len(left_out) == made.stream.tally.held_out
        assert 0.12 < len(left_out) / 300 < 0.28  # 0.2 give or take 3.5 standard errors of 0.023
        assert made.stream.tally.examples == len(seen)

    def test_holds_out_what_data_on_a_disk_holds_out(self) -> None:
        write("a.jsonl", TEXTS)
        cfg = options("data.train=a.jsonl")
        disk = prepare(cfg.data, load_tokenizer(cfg.model), cfg.stage, cfg.train.seed)
        assert isinstance(disk.train, TokenDataset)
        assert Counter(one_epoch(stream("data.train=a.jsonl"))) == Counter(
            map(text_of, disk.train.groups(range(len(disk.train))))
        )

    def test_comes_in_another_order_each_time_and_in_blocks(self) -> None:
        write("a.jsonl", TEXTS)
        shuffled = stream("data.train=a.jsonl", "data.eval_fraction=0")
        first, second = take(shuffled, 300), take(shuffled, 300)
        assert sorted(first) == sorted(second) == sorted(TEXTS)
        assert first != second
        for start in range(0, 300, 50):  # shuffle_buffer=50: what a block holds stands together in the file
            assert sorted(first[start : start + 50]) == sorted(TEXTS[start : start + 50])
            assert first[start : start + 50] != TEXTS[start : start + 50]
        assert take(stream("data.train=a.jsonl", "data.eval_fraction=0"), 300) == first
        assert take(stream("data.train=a.jsonl", "data.eval_fraction=0", "train.seed=1"), 300) != first
        plain = stream("data.train=a.jsonl", "data.eval_fraction=0", "data.shuffle=false")
        assert take(plain, 600) == TEXTS + TEXTS

    def test_is_cut_by_its_limit(self) -> None:
        for name in "ab":
            write(f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
        cut = ["data.train=[a.jsonl,b.jsonl]", "data.train_limit=9", "data.eval_fraction=0"]
        seen = take(stream(*cut), 18)
        assert Counter(text[0] for text in seen) == {"a": 8, "b": 10}
        assert Counter(Counter(seen).values()) == {2: 9}

    @pytest.mark.parametrize("size", [["batch.size=7"], ["batch.size=", "batch.tokens=100"]], ids=["size", "tokens"])
    def test_is_shared_by_ranks_without_overlap_or_loss(self, size: list[str]) -> None:
        write("a.jsonl", TEXTS)
        given = ["data.train=a.jsonl", "data.eval_fraction=0", "data.shuffle_buffer=64"]
        cfg = options(*given, *[key for key in size if not key.endswith("=")])

        def steps(rank: int, world: int) -> list[Step]:
            loader = StreamLoader(
                stream(*given), PACKING, None if cfg.batch.tokens else 7, cfg.batch.tokens, rank, world
            )
            return list(loader.steps(0, 60))

        def ids(step: Step) -> list[str]:
            return [name for micro in step.micro_batches if micro.weight for name in micro.ids]

        alone, ranks = steps(0, 1), [steps(rank, 2) for rank in range(2)]
        seen: list[str] = []
        for one, *both in zip(alone, *ranks, strict=True):
            assert sorted(ids(one)) == sorted(ids(both[0]) + ids(both[1])), "a step holds the same on 1 and on 2"
            assert {(step.tokens, step.trained_tokens) for step in (one, *both)} == {(one.tokens, one.trained_tokens)}
            assert len(both[0].micro_batches) == len(both[1].micro_batches)
            assert one.stream == both[0].stream == both[1].stream
            if cfg.batch.tokens:
                assert 100 <= one.tokens < 100 + 16  # reached by the last example, of at most "299+299=598<eos>"
            seen += ids(one)
        assert Counter(seen[:300]) == dict.fromkeys(set(seen), 1)
        assert len(set(seen)) == 300


KINDS = {
    "jsonl": ["data.train=a.jsonl"],
    "jsonl.gz": ["data.train=a.jsonl.gz"],
    "parquet": ["data.train=a.parquet"],
    "csv": ["data.train=a.csv"],
    "text": ["data.train=a.txt"],
    "text.gz": ["data.train=b.txt.gz"],
    "documents": ["data.train=a.txt", "data.document_separator=\\n"],
    "folder": ["data.train=folder"],
    "glob and limit": ["data.train=folder/*.jsonl", "data.train_limit=100"],
    "mix": ["data.train=[folder/a.jsonl,folder/b.jsonl]", "data.mix=[3,1]"],
    "in order": ["data.train=folder", "data.shuffle=false"],
    "embedded": ["data.train=embedded:text:200"],
    "hub": ["data.train=hub:set"],
    "sft": ["stage=sft", "data.train=embedded:prompt_completion:150"],
}


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of file; text in blocks of 700 characters, so that a file has several."""
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv", "a.txt"):
        write(name, TEXTS)
    Path("b.txt.gz").write_bytes(gzip.compress(Path("a.txt").read_bytes()))
    for number, name in enumerate("abc"):
        write(f"folder/{name}.jsonl", TEXTS[number * 70 : number * 70 + 70])
        write(f"set/{name}.parquet", TEXTS[number * 70 : number * 70 + 70])
    monkeypatch.setattr(readers, "placed_blocks", partial(placed_blocks, block_chars=700))


@pytest.mark.usefixtures("files")
class TestGoingBack:
    @pytest.mark.parametrize("kind", long_but(KINDS, "sft", "jsonl", "parquet", "mix", "text"))
    def test_to_any_place_gives_what_came_after_it(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Saved as JSON at many places of two epochs and taken up in a new process: the same examples, the same counts."""
        monkeypatch.setattr("posttrain.data.streaming.readers.BATCH", 16)
        asked = _local_hub(monkeypatch)
        whole = stream(*KINDS[kind])
        states, seen = [], []
        for _ in range(500):
            states.append(json.dumps(whole.state()))
            seen += take(whole, 1)
        assert whole.feeds[0].epoch >= 1, "the test must reach the second epoch"
        for at in [1, 49, 50, 51, 163, 240, 301, 377, 450]:
            again = stream(*KINDS[kind])
            again.restore(json.loads(states[at]))
            assert take(again, 500 - at) == seen[at:], at
            assert again.tally == whole.tally, at
        assert set(asked) == ({("set", None, "train", True)} if kind == "hub" else set())  # never downloaded whole

    def test_reads_a_line_of_json_no_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sought, not read forward: of the lines before the block's first batch none is parsed again."""
        monkeypatch.setattr("posttrain.data.streaming.readers.BATCH", 16)
        whole = stream("data.train=a.jsonl", "data.eval_fraction=0")
        take(whole, 210)
        state, again = whole.state(), stream("data.train=a.jsonl", "data.eval_fraction=0")
        parsed = []
        from posttrain.data.streaming import cursors

        original = cursors.json_line
        monkeypatch.setattr(
            cursors, "json_line", lambda path, number, *rest: parsed.append(number) or original(path, number, *rest)
        )
        again.restore(state)
        assert parsed[0] == 193  # block 5 begins at row 201, in the batch of rows 193 to 208
        assert again.forward == []
        assert StreamLoader(again, PACKING, 7, None).restore(state) == ["goes on in block 5 of the stream"]

    def test_says_where_it_must_read_forward(self) -> None:
        whole = stream("data.train=a.csv")
        take(whole, 60)
        (_, told) = StreamLoader(stream("data.train=a.csv"), PACKING, 7, None).restore(whole.state())
        assert told == "read forward to where the run goes on, for that kind of file cannot be sought: a.csv"

    def test_to_another_stream_is_refused(self) -> None:
        whole = stream("data.train=a.jsonl")
        take(whole, 60)
        state = whole.state()
        write("a.jsonl", [*TEXTS, "300+300=600"])
        with pytest.raises(CheckpointError, match=r"its files have changed, or data\.\*, train\.seed"):
            stream("data.train=a.jsonl").restore(state)
        write("a.jsonl", TEXTS)
        stream("data.train=a.jsonl", "data.on_bad_row=skip").restore(state)
        with pytest.raises(CheckpointError, match="is not the stream that the checkpoint is of"):
            stream("data.train=a.jsonl", "data.shuffle_buffer=49").restore(state)


def _local_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """hub:set is the folder of that name, read by the hub's own library as it streams. What that was asked for."""
    import datasets

    load, asked = datasets.load_dataset, []

    def local(name: str, config: str | None, split: str, streaming: bool = False) -> Any:
        asked.append((name, config, split, streaming))
        return load("parquet", data_files=f"{name}/*.parquet", split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return asked


@pytest.mark.usefixtures("files")
class TestText:
    def test_streamed_windows_are_those_of_the_file_on_a_disk(self) -> None:
        cfg = options("data.train=a.txt", "data.eval_fraction=0", "data.shuffle=false")
        disk = prepare(cfg.data, load_tokenizer(cfg.model), cfg.stage, cfg.train.seed)
        assert isinstance(disk.train, TokenDataset)
        ours = stream("data.train=a.txt", "data.eval_fraction=0", "data.shuffle=false")
        for theirs in disk.train.groups(range(len(disk.train))):
            mine = ours.next()
            assert (mine.prompt, mine.responses, mine.bytes) == (theirs.prompt, theirs.responses, theirs.bytes)
        assert ours.used == len(ours.examples)

    def test_a_file_without_text_gives_no_example(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the tokenizer puts a beginning-of-text before it."""
        monkeypatch.setattr("posttrain.data.tokenize.beginning", lambda tokenizer: [1])
        Path("empty.txt").write_text("")
        with pytest.raises(DataError, match="no example is left"):
            stream("data.train=empty.txt", "data.eval_fraction=0")
        cfg = options("data.train=[empty.txt,a.txt]", "data.eval_fraction=0")
        disk = prepare(cfg.data, load_tokenizer(cfg.model), cfg.stage, cfg.train.seed).train
        assert isinstance(disk, TokenDataset)
        assert {group.prompt[0] for group in disk.groups([0])} == {1}
        assert set(disk.column("source")) == {1}

    @pytest.mark.parametrize("text", ["a b\r\nc é " * 300, "x" * 9_000, "一\n二三\n" * 400, "\ufeffone two " * 200])
    def test_blocks_go_on_from_each_place(self, text: str) -> None:
        Path("t.txt").write_bytes(text.encode())
        found = list(placed_blocks("t.txt", block_chars=100))
        blocks = list(text_blocks("t.txt", block_chars=100))
        assert [block for block, _ in found] == blocks
        assert len(blocks) > 5
        for number, (_, place) in enumerate(found):
            assert [block for block, _ in placed_blocks("t.txt", place, 100)] == blocks[number + 1 :]


class TestRows:
    def test_a_bad_one_late_in_a_file_is_named(self) -> None:
        rows = [{"text": text} for text in TEXTS[:150]] + [{"text": 5}]
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        bad = stream("data.train=a.jsonl", "data.eval_fraction=0")
        with pytest.raises(DataError, match=r"a\.jsonl, row 151, column 'text': found int \(5\)"):
            take(bad, 300)
        skipping = stream("data.train=a.jsonl", "data.on_bad_row=skip")
        one_epoch(skipping)
        assert skipping.tally.lost == 1
        assert any("1 of 151 rows skipped" in line for line in skipping.lines())

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
    def test_a_line_that_is_no_row_is_skipped_and_counted_once(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where a run goes on behind it, from every place: the rows, their numbers and the counts stay."""
        monkeypatch.setattr("posttrain.data.streaming.readers.BATCH", 16)
        broken = "a,b" if name == "a.csv" else '{"text": "1'
        rows = TEXTS if name == "a.csv" else [json.dumps({"text": text}) for text in TEXTS]
        lines = [*rows[:16], broken, *rows[16:120], "", broken, broken, *rows[120:], broken]
        text = "\n".join(["text", *lines] if name == "a.csv" else lines) + "\n"
        Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        given = [f"data.train={name}", "data.eval_fraction=0", "data.on_bad_row=skip"]
        with pytest.raises(DataError, match=r"or set data\.on_bad_row=skip to skip and count such rows"):
            take(stream(*given[:2]), 300)
        whole = stream(*given)
        states, seen = [], []
        for _ in range(600):
            states.append(json.dumps(whole.state()))
            seen += take(whole, 1)
        assert sorted(seen[:300]) == sorted(seen[300:]) == sorted(TEXTS)
        assert (whole.tally.report.rows, whole.tally.lost) == (608, 8)
        place = "row 17 (line 18)" if name == "a.csv" else "line 17, column"
        assert whole.tally.report.messages[0].startswith(f"{name}, {place}")
        for at in (15, 49, 100, 199, 299, 301):
            again = stream(*given)
            again.restore(json.loads(states[at]))
            assert take(again, 600 - at) == seen[at:], at
            assert again.tally == whole.tally, at

    def test_a_column_that_comes_late_is_not_passed_over(self) -> None:
        rows: list[dict[str, str]] = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(120)]
        rows[110]["system"] = "Add."
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=r"a\.jsonl, row 111, column 'system': the first 100 rows"):
            one_epoch(stream("stage=sft", "data.train=a.jsonl"))
        skipping = stream("stage=sft", "data.train=a.jsonl", "data.on_bad_row=skip", "data.eval_fraction=0")
        assert len(one_epoch(skipping)) == 119
        assert skipping.tally.report.skipped == 1

    def test_losing_many_stops_the_run_as_it_reads(self) -> None:
        write("a.jsonl", [*TEXTS, *("x" * 99 for _ in range(100))] * 5)
        lossy = ["data.train=a.jsonl", "data.on_too_long=drop", "data.eval_fraction=0"]
        with pytest.raises(DataError, match=r"data\.train: 252 of 1,152 examples .* more than data.max_lost_fraction"):
            take(stream(*lossy), 3_000)  # 9 batches of 128 are the first 1,000: two rounds of 400, and 52 of 352
        told = stream(*lossy, "data.max_lost_fraction=0.3")
        take(told, 320)
        assert told.news() == ["of the data read so far: 100 dropped: longer than data.max_length=32 tokens"]
        assert told.news() == []
        write("b.jsonl", ["x" * 99] * 3)
        with pytest.raises(DataError, match="3 of 3 examples"):
            prepared("data.train=b.jsonl", "data.on_too_long=drop", "data.eval_fraction=0")

    def test_the_evaluation_set_is_held_to_the_same_share(self) -> None:
        write("a.jsonl", TEXTS)
        write("b.jsonl", [*TEXTS[:10], *("x" * 99 for _ in range(5))])
        given = ["data.train=a.jsonl", "data.eval=b.jsonl", "data.on_too_long=drop"]
        assert len(prepared(*given, "data.max_lost_fraction=0.4").eval) == 10
        with pytest.raises(DataError, match=r"data\.eval: 5 of 15 examples \(33%\).*data\.max_lost_fraction=0\.2"):
            prepared(*given)

    def test_a_mix_draws_by_weight(self) -> None:
        for name in "ab":
            write(f"{name}.jsonl", [f"{name} {text}" for text in TEXTS[:40]])
        mixed = stream("data.train=[a.jsonl,b.jsonl]", "data.mix=[3,1]", "data.eval_fraction=0")
        seen = take(mixed, 2_000)
        assert abs(Counter(text[0] for text in seen)["a"] / 2_000 - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2_000)
        each = Counter(text for text in seen if text[0] == "a")
        assert len(each) == 40
        assert max(each.values()) - min(each.values()) <= 2  # whole epochs of each, and up to a block shuffled


class TestRefused:
    def test_without_steps(self) -> None:
        with pytest.raises(ConfigError, match=r"needs train\.steps.*got train\.epochs=2; try train\.steps=1000"):
            resolve(["model.path=embedded", "data.train=a.jsonl", "data.streaming=true", "train.epochs=2"], "train")

    def test_by_prepare(self) -> None:
        with pytest.raises(ConfigError, match="tokenises while training, so there is nothing to prepare"):
            resolve(["model.path=embedded", "data.train=a.jsonl", "data.streaming=true"], "prepare")

    def test_a_json_document(self) -> None:
        Path("a.json").write_text(json.dumps([{"text": "a"}]))
        with pytest.raises(DataError, match=r"a\.json: a \.json is one document .*jq -c"):
            stream("data.train=a.json")

    def test_but_not_as_evaluation_data_which_is_read_beforehand(self) -> None:
        write("a.jsonl", TEXTS)
        Path("a.json").write_text(json.dumps([{"text": text} for text in TEXTS[:5]]))
        assert list(map(text_of, prepared("data.train=a.jsonl", "data.eval=a.json").eval.groups(range(5)))) == TEXTS[:5]
        rows = [{"prompt": f"{n % 5}+1=", "completion": str(n), "reward": n} for n in range(10)]
        Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        joined = prepared("stage=sft", "data.train=embedded:prompt_completion:150", "data.eval=scored.jsonl").eval
        assert list(map(text_of, joined.groups(range(len(joined))))) == [f"{n}+1={n + 5}" for n in range(5)]

    def test_rows_that_must_be_joined(self) -> None:
        Path("a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "reward": 1}) + "\n")
        with pytest.raises(DataError, match="joins the rows of a prompt"):
            stream("stage=sft", "data.train=a.jsonl")

    def test_what_is_empty(self) -> None:
        Path("a.jsonl").write_text("\n\n")
        with pytest.raises(DataError, match=r"a\.jsonl: the file is empty, or holds no rows"):
            stream("data.train=a.jsonl")
        Path("a.txt").write_text("")
        with pytest.raises(DataError, match="no example is left to train on"):
            stream("data.train=a.txt")

    def test_a_mix_of_nothing(self) -> None:
        write("a.jsonl", TEXTS)
        with pytest.raises(ConfigError, match=r"data\.mix must give a weight above 0"):
            stream("data.train=[a.jsonl,a.jsonl]", "data.mix=[0,0]")


@pytest.mark.long
def test_memory_does_not_grow_with_the_data() -> None:
    """Traced Python memory (numpy's too) at its highest, once through 500 and once through 5,000 examples."""
    peaks = {}
    for count in (500, 5_000):
        write(f"{count}.jsonl", [f"{n} " + "carry " * 20 for n in range(count)])
        source = stream(f"data.train={count}.jsonl", "data.max_length=200", "data.eval_limit=20")
        tracemalloc.start()
        assert len(one_epoch_uncollected(source)) == source.tally.examples
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.7 * count < source.tally.examples < 0.9 * count
    print(peaks)
    assert peaks[5_000] < peaks[500] + 100_000, peaks  # of names, 4,500 more would take 400,000


def test_a_block_is_held_compact() -> None:
    """Each token more in a block takes 5 bytes and its text (of small ids here: lists would take 12, and 50 of large ones)."""
    write("a.jsonl", [f"{n} " + "7" * 500 for n in range(600)])
    peaks, tokens = [], []
    for size in (200, 600):
        given = ["data.train=a.jsonl", "data.max_length=512", "data.eval_fraction=0", f"data.shuffle_buffer={size}"]
        source = stream(*given)
        tracemalloc.start()
        source.next()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        tokens.append(sum(len(group.responses[0]) for group in source.examples))
    each = (peaks[1] - peaks[0]) / (tokens[1] - tokens[0])
    assert 5 < each < 7


def test_the_order_is_told_as_it_is() -> None:
    for name in "ab":
        write(f"{name}.jsonl", TEXTS[:40])
    two, mix = "data.train=[a.jsonl,b.jsonl]", "data.mix=[3,1]"
    assert stream(two, "data.shuffle=false").describe() == "in the order of the files"
    assert stream(two, mix, "data.shuffle=false").describe() == (
        "drawn from the sources by data.mix, each source in its own order"
    )
    assert stream(two, mix).describe() == (
        "drawn from the sources by data.mix, shuffled 50 examples at a time (data.shuffle_buffer)"
    )


def one_epoch_uncollected(source: Stream) -> range:
    """As many as an epoch has, none of them kept."""
    count = 0
    while source.feeds[0].epoch == 0:
        source.next()
        count += 1
        assert len(source.examples) <= source.buffer
        while source.used < len(source.examples):
            source.next()
            count += 1
    return range(count)


def test_a_run_streams_and_says_so(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", TEXTS)
    run("stage=pretrain", "data.train=a.jsonl", "data.eval=", "data.streaming=true", "data.shuffle_buffer=20",
        "data.eval_limit=9", "batch.size=50", "train.steps=7", "run.dir=r")  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "streamed: counts unknown; shuffled 20 examples at a time (data.shuffle_buffer); 9 evaluation examples",
        "a.jsonl: documents: text → text (from the first 100 rows)",
        "held out for evaluation: 9 examples, the first whose content's hash falls into data.eval_fraction=0.05",
        "in epoch 2 of the data",
    ):
        assert words in said, said
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "train"][-1]["metrics"]
    assert last["epoch"] == 2
    assert last["examples_lost"] == 0
    assert 350 <= last["examples_read"] < 350 + 20
