"""What the tests of report.html open, ask and feed: a page in the browser, its outline, a comparison, hostile text."""

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

SCROLLS = "[...document.querySelectorAll('.scroll, .text.long')]"
UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"
CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = colour => parts(colour).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = element => { for (let e = element; e; e = e.parentElement) {
    const found = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(found)) return found; } };
  return [...document.querySelectorAll('p, td, th, a, li, figcaption, summary, h1, h2, .text, caption, svg text')]
    .filter(e => e.textContent.trim() && e.getClientRects().length && !e.closest('.skip')).map(e => {
      const style = getComputedStyle(e), colour = e.closest('svg') ? style.fill : style.color;
      const [a, b] = [light(colour), light(ground(e))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + ' ' + e.textContent.slice(0, 40)]; })
    .sort((a, b) => a[0] - b[0])[0]; }"""


class Outline(HTMLParser):
    """Ids, headings, what is referred to, and whether every element is closed in its turn."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.ids, self.headings, self.refers, self.open, self.wrong = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h[1-6]", tag) else []
        for value in (
            found.get(name) or "" for name in ("href", "xlink:href", "clip-path", "style", "aria-labelledby")
        ):
            self.refers += re.findall(r"(?:^|url\()#([^)]+)", value)
        self.refers += found.get("aria-labelledby", "").split()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def drawn(view):
    """Of every figure: whether it has a box, and how many of its marks are within one."""
    return view.ask(
        "[...document.querySelectorAll('figure')].map(f => { const s = f.querySelector('svg'), b = s.getBoundingClientRect();"
        "return [s.querySelector('title').textContent, b.width, b.height,"
        "[...s.querySelectorAll('path, use')].filter(p => { const r = p.getBoundingClientRect();"
        "const c = getComputedStyle(p);"
        "return r.width + r.height > 0 && !p.closest('defs') && c.stroke + c.fill !== 'nonenone'"
        "}).length] })"
    )


@dataclass
class Opened:
    """A page in the browser. faults: every console message, error, dialog and request but for the file itself."""

    page: Any
    faults: list[str] = field(default_factory=list)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


COMPARISON = {
    "runs": [
        {"name": name, "path": f"runs/{name}", "stage": "sft", "step": 20, "model": "embedded"}
        for name in ("base", "long", "wide")
    ],
    "examples": 40,
    "differs": [["optim.lr", 0.1, 0.2, None], ["data.train", "a.jsonl", "a.jsonl", "<b>.jsonl"]],
    "tables": [
        {
            "run": run,
            "rows": [
                {
                    "metric": metric,
                    "baseline": {"value": 0.5, "low": 0.4, "high": 0.6},
                    "now": {"value": 0.5 + gap, "low": 0.4, "high": 0.9},
                    "change": {
                        "value": gap, "low": gap - 0.1, "high": gap + 0.1, "wins": 9, "ties": 30, "losses": 1, "p_value": 0.004,
                        "detectable": 0.14, "better": None if abs(gap) < 0.1 else (gap > 0) == (metric != "nll"),
                        "sentence": f"{metric}: what was found for {run}", "note": "",
                    },
                    "p_holm": 0.012,
                }
                for metric, gap in (("accuracy", shift), ("nll", -shift / 2))
            ],
        }
        for run, shift in (("long", 0.3), ("wide", -0.05))
    ],
    "note": "p after Holm's correction for 4 comparisons",
    "movers": [
        {
            "run": "long", "metric": "accuracy",
            "losses": [{"id": "17", "question": "1+1=", "change": -1.0, "reference": "2", "baseline": "2", "now": "<i>11</i>"}],
            "gains": [{"id": "18", "question": "2+2=", "change": 1.0, "reference": "4", "baseline": None, "now": "4"}],
        }
    ],
    "changes": [{"run": "long", "metric": "accuracy", "values": [0.0, 1.0, 1.0, -1.0, float("nan")]}],
    "warnings": ["wide was evaluated at another step"],
}  # fmt: skip


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</div></main><h1>mine</h1>", "{{7*7}} {% raw %}",
    "a\x00b\x1b[31m",
    "\u202egnirts\u202c", "\u0645\u0631\u062d\u0628\u0627", "**bold** [link](javascript:alert(3))", "$\\frac{1}{0}$ \\begin{x}",
    "zero\u200bwidth\u2066iso", "\ud800 alone", "x" * 100_000, "<!-- ", "]]>", "url(#f1-a) &amp; &lt;",
)  # fmt: skip


def hostile_run(path):
    """A run whose every text is what a model or a file might hold at worst."""
    every = "\n".join(HOSTILE)
    given = {
        "answer": every,
        "finished": False,
        "verdict": None,
        "verified": True,
        "question": every,
        "rewards": {every[:80]: 1.0},
    }
    lines: list[dict[str, Any]] = [
        {
            "id": text[:50],
            "prompt": text,
            "reference": text,
            "before": given | {"answer": text},
            "after": given | {"step": 6},
        }
        for text in HOSTILE
    ]
    lines.append(
        {"id": "r", "prompt": every, "iteration": every[:90], "rollouts": [given | {"reward": 1.0, "kl": 0.1}]}
    )
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["model"]["path"] = HOSTILE[1]
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "config.yaml").write_text(f"model: '{HOSTILE[0]}'\n", encoding="utf-8")
    (path / "overrides.txt").write_text(f"{HOSTILE[0]}\n{HOSTILE[1]}\n{'y' * 5_000}\n", encoding="utf-8")
    data = {"lines": list(HOSTILE), "facts": [[text, text] for text in HOSTILE], "counts": {HOSTILE[0]: 3}}
    (path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    change = summary["changes"]["nll"] | {"note": HOSTILE[1]}
    summary["changes"]["nll"] |= {"sentence": HOSTILE[0], "note": HOSTILE[0]}
    summary["slices"] = [
        {"by": text, "value": text, "examples": 3, "metric": "nll", "start": None, "end": None, "change": change}
        for text in HOSTILE
    ]
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path
