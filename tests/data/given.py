"""What the tests of formats share: reading rows given in the test, and two small conversations."""

import pytest

from posttrain.data.columns import Survey
from posttrain.data.formats import detect_format, to_groups
from posttrain.data.group import Message
from posttrain.errors import DataError

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}]


def detect(rows, **options):
    return detect_format(Survey().add(rows), source="f.jsonl", **options)


def read(rows, on_bad_row="error", report=None, **options):
    detected = detect(rows, **options)
    return list(to_groups((("f.jsonl", n, row) for n, row in enumerate(rows, 1)), detected, on_bad_row, report))


def one(row, **options):
    (group,) = read([row], **options)
    assert (group.file, group.row) == ("f.jsonl", 1)
    return group


def error_of(rows, **options):
    with pytest.raises(DataError) as caught:
        read(rows if isinstance(rows, list) else [rows], **options)
    return str(caught.value)
