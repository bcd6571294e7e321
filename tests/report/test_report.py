"""report.html as a reader meets it: in a browser, at a desk and on a phone, in light and dark, by keyboard."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_arguments
from pages import COMPARISON, CONTRAST, HOSTILE, SCROLLS, UNFOLD, Opened, Outline, drawn, hostile_run

from posttrain.report.page import write_comparison, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STAGES = {
    "sft": ("train.steps=6", "train.eval_every=3", "eval.generate=12", "eval.verifier=exact"),
    "dpo": ("data.train=embedded:pairs:64", "data.eval=embedded:pairs:40:held_out", "train.eval_every=2"),
    "ppo": (
        "data.train=embedded:prompts:64", "data.eval=embedded:prompts:16:held_out", "train.eval_every=2", "eval.generate=16",
        "stage.rewards=[exact]", "stage.samples=2", "stage.max_new_tokens=8",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def finished(warm_process: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a finished run of the embedded model, by stage; made once, never written to."""
    made: dict[str, Path] = {}

    def run_of(stage: str) -> Path:
        from posttrain import run

        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("finished") / stage
            run(small_arguments(f"stage={stage}", f"run.dir={made[stage]}", *STAGES[stage]))
        return made[stage]

    return run_of


@pytest.fixture
def a_copy(finished: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A finished run's directory that a test may change; its weights are left behind."""

    def copy(stage: str = "sft", name: str = "run") -> Path:
        leave = shutil.ignore_patterns("model", "checkpoints")
        return Path(shutil.copytree(finished(stage), tmp_path / name, ignore=leave))

    return copy


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; tests that need it skip, and say so, where it is absent."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file: opened(path, width=390, scheme="dark")."""
    contexts = []

    def open_file(path: Path, width: int = 1280, scheme: str = "light") -> Opened:
        height = 844 if width < 500 else 900
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        found = Opened(contexts[-1].new_page())
        uri = path.resolve().as_uri()
        found.page.on("console", lambda message: found.faults.append(f"console: {message.text}"))
        found.page.on("pageerror", lambda error: found.faults.append(f"error: {error}"))
        found.page.on("dialog", lambda dialog: (found.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        found.page.on(
            "request", lambda request: request.url in (uri, "data:,") or found.faults.append(f"request: {request.url}")
        )
        found.page.goto(uri)
        return found

    yield open_file
    for context in contexts:
        context.close()


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_page_is_whole_and_well_formed(finished, a_copy, stage):
    html = write_report(a_copy(stage)).read_text(encoding="utf-8")
    page = Outline(html)
    assert page.wrong == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.refers) <= set(page.ids)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    boxes = re.findall(r'<div class="(?:scroll|text long)"[^>]*>', html)
    assert boxes
    assert all('tabindex="0" role="region" aria-label="' in box for box in boxes), (
        "not every browser's keyboard reaches it"
    )
    assert "<script" not in html
    assert not re.search(r"#0102[0-9a-f]{2}\b", html), "a sentinel colour was left"
    for word in ("verdict", "learning rate", "gradient norm", "no detectable change" if stage == "ppo" else "better"):
        assert word in html


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(a_copy, opened, stage, width):
    view = opened(write_report(a_copy(stage)), width)
    view.ask(UNFOLD)
    figures = drawn(view)
    assert len(figures) >= {"sft": 8, "dpo": 10, "ppo": 12}[stage]
    for title, wide, high, marks in figures:
        assert wide > 200, title
        assert high > 80, title
        assert marks >= 4, title
    assert view.ask("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [width, width]
    assert view.faults == []


def test_the_figures_of_each_stage(a_copy):
    titles = {
        stage: re.findall(r"<title id=[^>]*>([^:<]*):", write_report(a_copy(stage, stage)).read_text(encoding="utf-8"))
        for stage in ("sft", "dpo", "ppo")
    }
    for stage, wanted in {
        "sft": ["training loss", "accuracy", "nll", "learning rate", "gradient norm", "reliability at the start"],
        "dpo": ["pair_accuracy", "reliability at step 4", "margins"],
        "ppo": [
            "reward against KL",
            "response length, tokens",
            "clip fraction",
            "entropy, nats a token",
            "seconds an iteration",
        ],
    }.items():
        assert set(wanted) <= set(titles[stage]), stage


def test_light_and_dark_can_be_read(a_copy, opened):
    path = write_report(a_copy())
    grounds = []
    for scheme in ("light", "dark"):
        view = opened(path, 1280, scheme)
        view.ask(UNFOLD)
        ratio, where = view.ask(CONTRAST)
        assert ratio >= 4.5, (scheme, where)
        grounds.append(view.ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_the_keyboard_reaches_what_scrolls_and_skips_the_contents(a_copy, opened):
    view = opened(write_report(a_copy()), 390)
    view.page.keyboard.press("Tab")
    assert view.ask("document.activeElement.textContent") == "Skip to the content"
    assert view.ask("document.activeElement.getBoundingClientRect().top") >= 0
    assert view.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    view.page.keyboard.press("Enter")
    assert view.ask("document.activeElement.id") == "content"
    reached = set()
    for _ in range(40):
        view.page.keyboard.press("Tab")
        reached.add(view.ask(f"{SCROLLS}.indexOf(document.activeElement)"))
    shown = view.ask(f"{SCROLLS}.map((e, i) => e.checkVisibility() ? i : -1)")
    assert set(shown) - {-1} <= reached
    assert len(set(shown) - {-1}) >= 3


def test_two_pages_of_a_finished_run_are_the_same_bytes(a_copy):
    path = a_copy()
    first = write_report(path).read_bytes()
    time.sleep(0.01)
    assert write_report(path).read_bytes() == first
    assert not list(path.glob(".*tmp"))


def test_the_verb_writes_it_without_torch(a_copy):
    path = a_copy()
    code = f"import sys; from posttrain.cli import main; status = main(['report', {str(path)!r}]); "
    code += "print(status, [m for m in ('torch', 'transformers', 'hydra', 'matplotlib.pyplot') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == str(path / "report.html")
    assert done.stdout.splitlines()[-1] == "0 []"
    assert (path / "report.html").as_uri() in done.stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_a_comparison(opened, tmp_path, width):
    view = opened(write_comparison(COMPARISON, tmp_path / "compare.html"), width)
    view.ask(UNFOLD)
    text = view.ask("document.body.innerText")
    for words in (
        "base against long, wide", "what was found for long", "▲ better", "= no detectable change", "0.012", "optim.lr",
        "<i>11</i>", "<b>.jsonl", "another step", "+0.300", "−1.000", "2 better, 1 worse, 1 the same, of 4 examples",
    ):  # fmt: skip
        assert words in text, words
    figures = drawn(view)
    assert [title.split(":")[0] for title, *_ in figures] == ["accuracy", "nll", "accuracy, long"]
    assert all(marks >= 4 for *_, marks in figures)
    assert view.ask("document.documentElement.scrollWidth") == width
    assert view.faults == []
    page = Outline((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert (page.wrong, page.open) == ([], [])
    assert len(page.ids) == len(set(page.ids))


def test_a_comparison_of_nothing(tmp_path):
    path = write_comparison({"runs": [], "tables": []}, tmp_path / "compare.html")
    assert "No score was compared" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [1280, 390])
def test_text_of_a_model_does_nothing_and_is_seen(a_copy, opened, width):
    path = write_report(hostile_run(a_copy(name='run"><script>alert(4)<')))
    view = opened(path, width)
    view.ask(UNFOLD)
    view.page.wait_for_timeout(100)
    assert view.faults == []
    assert view.ask("[document.scripts.length, document.images.length, document.querySelectorAll('h1').length]") == [
        0,
        0,
        1,
    ]
    assert view.ask("document.documentElement.scrollWidth") == width
    text = view.ask("[...document.querySelectorAll('#answers .text')].map(e => e.textContent).join('\\n')")
    for seen in (
        *HOSTILE[:4],
        "a⟨U+0000⟩b⟨U+001B⟩[31m",
        "⟨U+202E⟩gnirts⟨U+202C⟩",
        HOSTILE[6],
        HOSTILE[7],
        "zero⟨U+200B⟩width⟨U+2066⟩iso",
    ):
        assert seen in text, seen
    for seen in ("⟨U+D800⟩ alone", "96,000 characters not shown; samples.jsonl has them all", *HOSTILE[12:]):
        assert seen in text, seen
    assert 'run"><script>alert(4)<' in view.ask("document.querySelector('h1').textContent")
    assert re.search(r"96,000 characters not shown", view.ask("document.querySelector('#data').textContent"))
    assert path.stat().st_size < 3_000_000


def test_a_page_takes_no_wider_box_from_right_to_left_text(a_copy, opened):
    view = opened(write_report(hostile_run(a_copy())), 390)
    view.ask(UNFOLD)
    assert view.ask(
        "[...document.querySelectorAll('.text')].every(e => getComputedStyle(e).unicodeBidi.includes('isolate'))"
    )
    sides = view.ask("[...document.querySelectorAll('#answers .text')].map(e => getComputedStyle(e).direction)")
    assert {"ltr", "rtl"} <= set(sides)


def test_paths_of_no_run_are_told(capsys, tmp_path):
    from posttrain.cli import main

    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    for given, said in ((tmp_path / "none", "holds no config.json"), (tmp_path, "is no run's")):
        assert main(["report", str(given)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_templates_are_in_the_package():
    folder = Path(sys.modules["posttrain.report.page"].__file__).parent / "templates"
    assert {file.name for file in folder.iterdir()} >= {"base.html.j2", "run.html.j2", "compare.html.j2", "style.css"}
