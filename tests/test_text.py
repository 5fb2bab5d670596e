"""Text of strangers on terminals, in Markdown, in HTML and in csv."""

import io

import pytest
from markdown_it import MarkdownIt
from rich.progress import Progress
from rich.table import Table

from dino_hf.common.console import make_console
from dino_hf.common.text import (
    abbreviate,
    code_span,
    count_text,
    csv_cell,
    escape_html,
    escape_markdown,
    first_line,
    list_some,
    one_line,
    printable,
    shorten,
    size_text,
)

ATTACKS = [
    "\x1b]52;c;aGFja2Vk\x07",  # fills the clipboard
    "\x1b[2J\x1b[1A",  # clears the screen, moves up
    "\x9b2J",  # the same in one byte
    "a\rfake line",
    "a\x08\x08b",
    "\u202egnp.exe",  # written from right to left
    "\u2066x\u2069",
    "\ud800",  # half of a pair: it cannot be encoded
    "\u2028new line",
    "\x00",
]


@pytest.mark.parametrize("text", ATTACKS, ids=ascii)
def test_no_control_character_reaches_a_terminal(text):
    shown = printable(text)
    assert shown.isprintable()
    assert "\\" in shown
    shown.encode()


@pytest.mark.parametrize(
    "text", ["Zürich", "猫", "👩\u200d👧", "a\tb\nc", "C:\\data", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]
)
def test_words_of_all_languages_stay(text):
    assert printable(text) == text


def test_long_text_is_cut_and_says_so():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcdef... (1 more characters)"
    assert printable("x" * 10**6, limit=50) == "x" * 50 + "... (999,950 more characters)"


def rendered(console_output) -> str:
    file = io.StringIO()
    console = make_console(file=file, width=60, force_terminal=True, color_system=None)
    console_output(console)
    return file.getvalue()


@pytest.mark.parametrize("text", ATTACKS[:6], ids=ascii)
def test_tables_sentences_and_progress_are_printable(text):
    def show(console):
        table = Table(text, title=text)
        table.add_row(text)
        console.print(table)
        console.print(f"[red]{text}[/red]")

    shown = rendered(show)
    assert text not in shown
    assert not set(shown.replace("\n", "")) & {"\x1b", "\x9b", "\x07", "\r", "\x08", "\u202e"}
    assert "[red]" in shown


def test_progress_still_moves_the_cursor():
    def show(console):
        with Progress(console=console) as progress:
            progress.add_task("\x1b]0;title\x07", total=3)
            progress.refresh()

    shown = rendered(show)
    assert "\x1b[?25l" in shown  # hides the cursor, as rich does
    assert "\x1b]0" not in shown
    assert "\\x1b]0;t" in shown


STRANGE_NAMES = [
    "![](https://evil.example/pixel.png)",
    "[free](https://evil.example)",
    "<img src=https://evil.example/p.png>",
    "<script>alert(1)</script>",
    "**bold** __bold__ ~~gone~~ `code`",
    "a | b",
    "# heading",
    "1. list",
    "- list",
    "+ list",
    "> quote",
    "www.evil.example",
    "https://evil.example/x",
    "&lt;b&gt;",
    "$x^2$",
    "back\\slash\\*",
    "[x]: https://evil.example",
    "===",
    "trailing\\",
]


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_markdown_shows_a_name_as_it_is(name):
    for text in (escape_markdown(name), f"| a |\n| --- |\n| {escape_markdown(name)} |"):
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
        inline = [token for token in tokens if token.type == "inline"][-1]
        assert {child.type for child in inline.children} <= {"text", "text_special", "softbreak"}
        assert "".join(child.content for child in inline.children).strip() == name
        assert {token.type.split("_")[0] for token in tokens} <= {
            "paragraph",
            "inline",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        }


@pytest.mark.parametrize("name", ["traffic_light", "T-shirt", "Größe 3", "a.b", "(old)"])
def test_plain_names_stay_readable_in_markdown(name):
    assert escape_markdown(name) == name


def test_values_of_strangers_are_one_short_line():
    assert one_line("a\n\n b\x1b") == "a b\N{REPLACEMENT CHARACTER}"
    assert len(one_line("x" * 10**6)) == 200
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 199 + "…"
    assert code_span("a`b``c") == "`a'b''c`"
    assert code_span("") == ""


def test_html_is_shown_and_not_read():
    assert escape_html("<a href=\"x\" b='y'>&") == "&lt;a href=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1"])
def test_a_spreadsheet_finds_no_formula(text):
    assert csv_cell(text) == "'" + text.replace("\r", "\\r")


@pytest.mark.parametrize("text", ATTACKS)
def test_a_csv_file_has_no_control_characters(text):
    assert csv_cell(text) == printable(text) != text


@pytest.mark.parametrize("value", ["cat", "-1.5", "+3e-4", "-.5", "", -1.5, None, 7])
def test_other_cells_stay(value):
    assert csv_cell(value) is value


def test_abbreviated_text_is_one_line_of_bounded_length():
    assert abbreviate("a \n\t b", 5) == "a b"
    assert abbreviate("abcdef", 6) == "abcdef"
    assert abbreviate("abcd efg", 6) == "abcd…"
    assert abbreviate("abcdefg", 6, keep_end=True) == "…cdefg"
    assert abbreviate(" " * 10**7 + "a", 6) == "…"  # the whole text is not looked at
    assert len(abbreviate("x" * 10**7, 6)) == 6


@pytest.mark.parametrize(
    ("items", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a"] * 1002, "a, a and 1,000 more")]
)
def test_some_of_many_items_are_listed(items, text):
    assert list_some(items, 2) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "box", "1 box"), (2000, "box", "2,000 boxes"), (0, "class", "0 classes"), (3, "image", "3 images")],
)
def test_a_number_has_its_noun(count, noun, text):
    assert count_text(count, noun) == text


def test_the_first_line_of_an_error_is_never_empty():
    assert first_line(ValueError("\n  bad\nmore")) == "bad"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(OSError("x" * 400)) == "x" * 299 + "…"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (2**20 - 1, "1024 KiB"), (2**20, "1.0 MiB"), (2**30 - 2**20, "1023 MiB"), (2**30, "1.0 GiB"),
        (99.9 * 2**20, "99.9 MiB"), (100 * 2**20, "100 MiB"), (100.5 * 2**30, "100 GiB"),
    ],
)  # fmt: skip
def test_a_size_has_the_largest_unit_and_a_decimal_below_100(num_bytes, text):
    assert size_text(num_bytes) == text
