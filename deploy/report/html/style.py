"""The style sheet of every page, and what a browser may do with a page."""

from __future__ import annotations

import base64
import hashlib

from .elements import Markup, make, make_void

STYLE = """
:root {
  --page: #ffffff; --box: #f5f7f9; --line: #d3d9df; --text: #1b2026; --soft: #55606b; --accent: #0a58ca;
  --tail: #a34700; --limit: #b3122c;
  --ship: #12652f; --ship-box: #e5f5ea; --check: #704700; --check-box: #fff3d1;
  --stop: #a00f27; --stop-box: #ffe8ea;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --box: #1e2328; --line: #39424b; --text: #e7eaed; --soft: #a7b1bb; --accent: #8ab4f8;
    --tail: #ffb072; --limit: #ff8e9b;
    --ship: #86e2a4; --ship-box: #12301d; --check: #f4cf7c; --check-box: #332709;
    --stop: #ffa3ac; --stop-box: #3b151a;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 62rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word;
}
h1, pre, dd, li, figcaption, td { overflow-wrap: anywhere; }
table.numbers td { overflow-wrap: break-word; }
pre .flag { display: inline-block; max-width: 100%; }
thead th { overflow-wrap: normal; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 0; display: inline; }
section { margin-top: 1rem; border-top: 1px solid var(--line); }
summary { cursor: pointer; padding: .6rem 0; }
summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
section > details > div { padding-bottom: .8rem; scroll-margin-top: 3.6rem; }
details.rows { margin: .6rem 0; }
details.rows > summary { font-size: .93rem; color: var(--soft); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, figure, dl, table, pre, ul { margin: .6rem 0; }
a { color: var(--accent); }
a:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .87em; }
pre {
  background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  white-space: pre-wrap;
}
.soft, figcaption, caption, dt { color: var(--soft); }
.verdict {
  border-left: .4rem solid; border-radius: 6px; padding: .8rem 1rem; margin: 0; font-size: 1.12rem;
}
.ship { color: var(--ship); background: var(--ship-box); }
.check { color: var(--check); background: var(--check-box); }
.stop { color: var(--stop); background: var(--stop-box); }
.word { font-weight: 700; white-space: nowrap; }
thead td { border-bottom: 2px solid var(--line); }
td .word { padding: .1rem .4rem; border-radius: 4px; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; }
dl.tiles > div {
  background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
}
dl.tiles dd { font-size: 1.15rem; font-weight: 600; line-height: 1.3; }
dd { margin: 0; }
dt { font-size: .87rem; }
dl.facts > div {
  display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; padding: .25rem 0;
  border-bottom: 1px solid var(--line);
}
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; font-size: .93rem; }
ul.warnings { padding: .7rem 1rem .7rem 2rem; border-radius: 6px; background: var(--check-box);
  color: var(--check); }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; font-size: .87rem; }
th, td {
  text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid var(--line);
  min-width: 4.2rem;
}
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; min-width: 8rem; }
table.numbers td, table.numbers thead tr > * + * { text-align: right; }
svg { display: block; width: 100%; }
svg.bar { height: .9rem; min-width: 5rem; background: var(--box); border-radius: 2px; margin-top: .25rem; }
svg.histogram { height: 8rem; background: var(--box); border-radius: 4px; }
svg.scatter { max-width: 30rem; background: var(--box); border-radius: 4px; font-size: 11px; }
svg.scatter text { fill: var(--text); }
svg.matrix { max-width: 36rem; font-size: 3.8px; }
svg.matrix text { fill: var(--text); }
svg.matrix .number { fill: var(--soft); }
.none { fill: var(--box); }
.same { fill: var(--line); }
.cell { fill: var(--accent); }
ul.flips { list-style: none; padding: 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
ul.flips figure { margin: 0; }
ul.flips img { display: block; width: 6rem; height: 6rem; object-fit: contain; background: var(--box);
  border-radius: 4px; }
ul.flips span { display: block; }
.axis-line { fill: var(--soft); }
.fill { fill: var(--accent); }
.median { fill: var(--text); }
.tail { fill: var(--tail); }
.limit { fill: var(--limit); }
.key { display: inline-block; width: .55rem; height: .8rem; margin: 0 .35rem 0 .1rem; border-radius: 2px;
  vertical-align: -.06rem; }
.median-key { background: var(--text); }
.tail-key { background: var(--tail); }
.limit-key { background: var(--limit); }
.unbroken { display: inline-block; margin-right: .8rem; }
.axis { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft); }
figcaption { font-size: .87rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); font-size: .9rem; color: var(--soft); }
@media screen and (max-width: 60rem) {
  dl.tiles dd { font-size: 1rem; }
  h1 { font-size: 1.2rem; }
  dl.facts > div { grid-template-columns: 1fr; gap: 0; }
  table, tbody, tr, td, tbody th { display: block; width: 100%; }
  caption { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--line); }
  th, td, tbody th { border: 0; padding: .1rem 0; min-width: 0; }
  td, table.numbers td { display: flex; justify-content: space-between; gap: 1rem; text-align: right; }
  tbody th::before { content: attr(data-label) ": "; color: var(--soft); font-weight: 400; }
  td[data-label]::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none;
    max-width: 50%; }
  td > svg.bar { width: 100%; }
}
@media print {
  html { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  table { font-size: 7.5pt; break-inside: avoid; }
  details.rows table { break-inside: auto; }
  th, td, tbody th { min-width: 0; padding: .2rem .25rem; }
  svg.bar { min-width: 1.5rem; }
  h2, h3, caption, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; }
  summary { list-style: none; }
  tr, figure, ul.flips > li, pre, .verdict, dl.tiles, dl.facts > div { break-inside: avoid; }
  .verdict, svg, img, .fill, .key, dl.tiles > div {
    -webkit-print-color-adjust: exact; print-color-adjust: exact;
  }
}
"""
"""The rules. Every text has a contrast of at least 4.5 with what lies behind it, in both colour schemes."""


def make_policy() -> str:
    """What a browser may load and run: this very style sheet, and nothing else, so that no content of a file
    could run or fetch anything even if it were no text."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def make_head(title: str) -> Markup:
    """The head of a page."""
    return make(
        "head",
        make_void("meta", charset="utf-8"),
        make_void("meta", http_equiv="Content-Security-Policy", content=make_policy()),
        make_void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        make_void("meta", name="color-scheme", content="light dark"),
        make_void("meta", name="referrer", content="no-referrer"),
        make_void("link", rel="icon", href="data:,"),
        make("title", title),
        make("style", Markup(STYLE)),
    )
