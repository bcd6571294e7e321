"""Files → rows: every kind, every way they can be broken, and memory that does not grow with them."""

import gzip
import json
import os
import tracemalloc
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.sources import STREAM, expand_sources, fingerprint, is_hub_id, is_text_stream, read_all, read_rows
from posttrain.data.text import text_blocks
from posttrain.errors import DataError

ROWS = [{"prompt": "a b", "completion": "é\nü"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,completion\na b,"é\nü"\nc,d\n'


def write(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def error_of(path, **options):
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path), **options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", LINES),  # what many hubs call .json
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip("\n")),
        ("a.JSONL", LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.csv", CSV),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.jsonl.gz", LINES),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.csv.gz", CSV),
    ],
)
def test_reads_the_same_rows_from_every_kind(tmp_path, name, content):
    assert list(read_rows(write(tmp_path / name, content))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_reads_parquet_and_one_json_object(tmp_path):
    nested = [{"messages": [{"role": "user", "content": "x"}], "n": 1}, {"messages": None, "n": 2}]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet")
    assert list(read_rows(str(tmp_path / "a.parquet"))) == [(1, nested[0]), (2, nested[1])]
    assert list(read_rows(write(tmp_path / "one.json", json.dumps(ROWS[0])))) == [(1, ROWS[0])]


def test_row_number_of_json_lines_is_the_line_number_and_blank_lines_pass(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n{"a": 2}\n\n')
    assert list(read_rows(path)) == [(2, {"a": 1}), (4, {"a": 2})]


def test_crlf_inside_a_quoted_csv_cell_is_kept_and_an_empty_cell_is_none(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\r\n"x\r\ny",\r\n')
    assert list(read_rows(path)) == [(1, {"a": "x\r\ny", "b": None})]


def test_a_csv_cell_may_be_longer_than_the_default_limit(tmp_path):
    assert len(next(read_rows(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")))[1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2,, "b": 3}\n', ["a.jsonl, line 2, column 9", "broken JSON", '{"a": 2,, "b": 3}']),
        ("a.jsonl", '[\n{"a": 1}\n]\n', ["line 1", "is a .json, not a .jsonl"]),
        ("a.jsonl", '{"a": 1}\n["x"]\n', ["a.jsonl, line 2", "found list (['x'])", "accepted: an object"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', ["a.json, line 2, column 7", "broken JSON"]),
        ("a.json", '{"a": 1}\n{"a" 2}', ["a.json, line 2, column 6", "broken JSON"]),
        ("a.json", '[{"a": 1}, "b"]', ["a.json, row 2", "found str ('b')", "accepted: an object"]),
        ("a.json", "3", ["a.json, row 1", "found int (3)"]),
        ("a.json", "[]", ["a.json", "empty"]),
        ("a.json", "", ["a.json", "empty"]),
        ("a.jsonl", "", ["a.jsonl", "empty"]),
        ("a.jsonl", "\n \n", ["a.jsonl", "empty"]),
        ("a.txt", " \n", ["a.txt", "empty"]),
        ("a.csv", "", ["a.csv", "empty"]),
        ("a.csv", "a,b\n", ["a.csv", "empty"]),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", ["a.csv, row 2 (line 4)", "3 cells", "2 columns (a, b)"]),
        ("a.csv", "a,a\n1,2\n", ["a.csv, line 1", "'a' twice"]),
        ("a.csv", "a;b\n1;2\n", ["a.csv, line 1", "'a;b'", "holds ';'"]),
        ("a.csv", 'a,b\n1,"2\n', ["a.csv, line 2", "broken csv", "quote"]),
        ("a.parquet", b"PAR1 no", ["a.parquet", "not a readable parquet"]),
        ("a.yaml", "a: 1", ["a.yaml", "unknown kind of file (.yaml)", ".jsonl", ".parquet"]),
        ("data", "a", ["unknown kind of file (no ending)"]),
    ],
)
def test_broken_content_is_told_with_file_and_place(tmp_path, name, content, said):
    message = error_of(write(tmp_path / name, content))
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_not_utf8_names_the_byte(tmp_path, name):
    text = b'{"prompt": "x"}\n' * 200_000 + b'{"prompt": "caf\xe9"}\n'  # past the first buffer of every reader
    message = error_of(write(tmp_path / name, text), document_separator="\n")
    at = 200_000 * 16 + 15
    assert f"byte 0xe9 at position {at} (line 200001)" in message
    assert "iconv -f ISO-8859-1 -t UTF-8" in message


def test_not_utf8_counts_bytes_when_a_character_spans_two_readings(tmp_path):
    text = b"x" * ((1 << 20) - 1) + "é".encode() + b"\xff"  # é begins on the last byte of the first MiB
    assert f"0xff at position {(1 << 20) + 1} " in error_of(write(tmp_path / "a.txt", text))
    cut = b"x" * ((1 << 20) - 1) + b"\xc3("  # and here it never ends
    assert f"0xc3 at position {(1 << 20) - 1} " in error_of(write(tmp_path / "b.txt", cut))


def test_utf16_is_named(tmp_path):
    assert "iconv -f UTF-16 " in error_of(write(tmp_path / "a.jsonl", LINES.encode("utf-16")))


def test_missing_files_name_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    assert f"did you mean {tmp_path}/train.jsonl?" in error_of(tmp_path / "trian.jsonl")
    assert f"folder {tmp_path}/no does not exist" in error_of(tmp_path / "no" / "where" / "a.jsonl")


def test_damaged_gzip_and_unreadable_files(tmp_path):
    whole = gzip.compress(os.urandom(50_000).hex().encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:1000])
    assert "cut.jsonl.gz: cannot be read" in error_of(tmp_path / "cut.jsonl.gz")
    path = write(tmp_path / "locked.jsonl", LINES)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file (root)")
    assert "Permission denied" in error_of(path)


def test_expand_sources_keeps_the_lists_order_and_sorts_within(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "a.txt", "README.md", "dataset_info.json", ".hidden.jsonl"):
        write(tmp_path / name, LINES)
    (tmp_path / "deep" / ".cache").mkdir(parents=True)
    write(tmp_path / "deep" / "c.csv.gz", CSV)
    write(tmp_path / "deep" / ".cache" / "d.jsonl", LINES)
    assert expand_sources("b.jsonl") == ["b.jsonl"]
    assert expand_sources(["b.jsonl", "a.*"]) == ["b.jsonl", "a.jsonl", "a.txt"]
    assert expand_sources(tmp_path) == [f"{tmp_path}/{n}" for n in ("a.jsonl", "a.txt", "b.jsonl", "deep/c.csv.gz")]
    assert expand_sources("**/*.gz") == ["deep/c.csv.gz"]
    assert expand_sources("org/name@train[:10]") == ["org/name@train[:10]"]
    assert [(file, row) for file, row, _ in read_all(["a.jsonl", "b.jsonl"])] == [
        ("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1), ("b.jsonl", 2),
    ]  # fmt: skip
    write(tmp_path / "odd[1].jsonl", LINES)
    assert expand_sources("odd[1].jsonl") == ["odd[1].jsonl"]
    with pytest.raises(DataError, match="no file matches"):
        expand_sources("*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a known kind"):
        expand_sources("empty")
    with pytest.raises(DataError, match="the list is empty"):
        expand_sources([])


def test_hub_ids(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    calls = []

    def load(name, config=None, split=None):
        calls.append((name, config, split))
        if name == "no/where":
            raise ConnectionError("cannot reach the hub\nand more")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("org/name", "org/name:main@test[:5]", "hub:gsm8k"):
        assert list(read_rows(source)) == [(1, ROWS[0]), (2, ROWS[1])]
    assert calls == [("org/name", None, "train"), ("org/name", "main", "test[:5]"), ("gsm8k", None, "train")]
    message = error_of("no/where")
    assert "no/where: no such file" in message
    assert "cannot reach the hub" in message
    assert "and more" not in message
    (tmp_path / "data").mkdir()
    assert not any(is_hub_id(path) for path in ("data/trian", "./a/b", "/a/b", "a/b.jsonl", "data"))


def test_fingerprint_is_of_the_content(tmp_path, monkeypatch):
    one, same, other = (write(tmp_path / n, c) for n, c in (("a.txt", "x" * 3), ("b.txt", "xxx"), ("c.txt", "xxy")))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    # blake2b with a 16-byte digest of b"xxx", by `printf xxx | b2sum -l 128`
    assert fingerprint(one) == "625832da4b348c5398db1e212dabaec2"
    monkeypatch.setattr("posttrain.data.sources.load_hub", lambda source: SimpleNamespace(_fingerprint="f1"))
    first = fingerprint("org/name")
    monkeypatch.setattr("posttrain.data.sources.load_hub", lambda source: SimpleNamespace(_fingerprint="f2"))
    assert fingerprint("org/name") != first


def test_a_txt_is_one_stream_unless_it_has_a_separator(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\nmore\n\n\n\ntwo\n\nthree\n")
    assert is_text_stream(path)
    assert not is_text_stream(path, "\n\n")
    assert list(read_rows(path)) == [(1, {STREAM: path})]
    texts = [(1, {"text": "one\nmore"}), (2, {"text": "two"}), (3, {"text": "three\n"})]
    assert list(read_rows(path, document_separator="\n\n")) == texts
    assert list(read_rows(path, document_separator="\\n\\n")) == texts  # as a shell hands it over
    assert "data.document_separator is empty" in error_of(path, document_separator="")


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = {
    "prose": "".join(f"Line {i}, it's said.\n" + "\n" * (i % 3) for i in range(900)),
    "code": "".join(f"def f{i}(x):\n    return x  +  {i}\n\n\n" for i in range(600)),
    "wikitext": "".join(f" = Title {i} = \n \n In {i} , a @-@ b . \n" for i in range(600)),
    "one line": "word 12 , (x)  " * 2000,
    "paragraphs": "One paragraph of a few words.\n\n" * 900,
    "chinese": "".join("学而时习之，不亦说乎？\n" * 3 + "\n" for _ in range(300)),
    "blank": ("\n   " * 7 + "a b") * 900,
}


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3], ids=["gpt2", "llama3"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_blocks_are_the_file_and_tokenise_apart_as_together(tmp_path, text, pattern):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    def pieces(text):
        return [piece for piece, _ in Split(Regex(pattern), "isolated").pre_tokenize_str(text)]

    blocks = list(text_blocks(write(tmp_path / "a.txt", text), block_chars=500))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) < 1000
    assert [piece for block in blocks for piece in pieces(block)] == pieces(text)


def test_text_blocks_read_crlf_and_gzip_alike(tmp_path):
    blocks = list(text_blocks(write(tmp_path / "a.txt", TEXTS["prose"]), 500))
    assert list(text_blocks(write(tmp_path / "b.txt", TEXTS["prose"].replace("\n", "\r\n")), 500)) == blocks
    assert list(text_blocks(write(tmp_path / "c.txt.gz", TEXTS["prose"]), 500)) == blocks


def test_text_blocks_of_endless_text(tmp_path):
    blocks = list(text_blocks(write(tmp_path / "a.txt", "x" * 50_000), block_chars=1000))
    assert [len(block) for block in blocks] == [17_000, 17_000, 16_000]


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    def peak(rows):
        line = {"a.jsonl": '{"text": "%s"}\n', "a.txt": "%s\n", "a.csv": '"%s"\n'}[name] % ("word " * 200)
        path = write(tmp_path / name, ("text\n" if name == "a.csv" else "") + line * rows)
        tracemalloc.start()
        for _ in text_blocks(path, 100_000) if name == "a.txt" else read_rows(path):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    peak(100)
    assert peak(20_000) < 1.2 * peak(2_000) + 100_000
