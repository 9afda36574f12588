"""Files of prompts: where a line ends, and tables with a column of prompts."""

from pathlib import Path

import pytest

from crdiff_export.cli.options import read_prompts
from crdiff_export.errors import PromptsError
from tests.support.messages import raises


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\r\nthree\rfour", ("one", "two", "three", "four")),
        ("a \u2028b\nc\u2029d\x0be\x0cf\x1cg\x85h", ("a \u2028b", "c\u2029d\x0be\x0cf\x1cg\x85h")),
        ("\ufeff one \n\n  \n# two\n", ("one", "# two")),
    ],
    ids=["line ends", "separators within a line", "spaces and signs"],
)
def test_a_line_ends_where_an_editor_ends_it(here: Path, text: str, prompts: tuple[str, ...]) -> None:
    Path("p.txt").write_bytes(text.encode())
    assert read_prompts(Path("p.txt")) == prompts


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.csv", 'prompt,seed\n"a red circle, on white",1\r\nfox,2\n', ("a red circle, on white", "fox")),
        ("p.CSV", 'seed, Prompt \n1,"say ""cheese"""\n\n2,\n', ('say "cheese"',)),
        ("p.tsv", "prompt\tseed\na, b\t1\n", ("a, b",)),
        ("p.csv", "\ufeffprompt\none\n", ("one",)),
    ],
)
def test_a_table_gives_its_column(here: Path, name: str, text: str, prompts: tuple[str, ...]) -> None:
    Path(name).write_bytes(text.encode())
    assert read_prompts(Path(name)) == prompts


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("p.csv", "a red circle\nfox\n", "a red circle"),
        ("p.csv", "prompt,prompt\na,b\n", "prompt, prompt"),
        ("p.csv", "", "nothing"),
        ("p.csv", "prompt\na red fox, on white\n", "line 2"),
        ("p.csv", 'seed,prompt\n1,"two\nlines"\n\n2\n', "line 5"),
        ("p.tsv", "prompt\tseed\nfox\t1\t2\n", "line 2"),
        ("p.csv", 'prompt\n"open', "p.csv"),
        ("p.tsv", "prompt,seed\na,1\n", "prompt,seed"),
        ("p.csv", "prompt\n \n", "has no prompt"),
        ("p.txt", " \n", "has no prompt"),
    ],
)
def test_a_file_without_prompts_is_refused(here: Path, name: str, text: str, key: str) -> None:
    Path(name).write_text(text)
    with raises(PromptsError, key):
        read_prompts(Path(name))
